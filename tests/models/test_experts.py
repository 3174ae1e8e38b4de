"""Experts against a slow loop in float64; that the combination is deterministic; that choices can be replayed."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import equations, jit, padded, rows, weights

from pt_jax.models import blocks, decoder, experts, linear
from pt_jax.models.cache import init_cache
from pt_jax.models.config import Config, Execution

# Odd sizes; layers without experts before, between and behind
PLAIN = Config(
    vocab=29, layers=2, width=20, heads=6, kv_heads=2, head_width=4, hidden=18, rope_base=5e5, eps=1e-2, tied=False,
    experts=5, experts_per_token=2, expert_hidden=11,
)  # fmt: skip
MIXED = dataclasses.replace(
    PLAIN, layers=5, expert_layers=(False, True, False, True, True), experts_per_token=3, norm_experts=False
)
ERNIE = dataclasses.replace(
    PLAIN, layers=3, expert_layers=(False, True, True), shared_hidden=7, router_bias=True, expert_floor=0.6,
    qk_norm=False, rope_interleaved=True,
)  # fmt: skip
ONE_OF_SEVEN = dataclasses.replace(PLAIN, experts=7, experts_per_token=1)
CONFIGS = pytest.mark.parametrize("config", [PLAIN, MIXED, ERNIE, ONE_OF_SEVEN], ids=["plain", "mixed", "ernie", "one"])


def layer(config, seed=0):
    """Weights of one layer with experts, and inputs; routers that choose clearly."""
    rng = np.random.default_rng(seed)
    d, E, F = config.width, config.experts, config.expert_hidden
    shapes = {"router": (d, E), "expert_gate": (E, d, F), "expert_up": (E, d, F), "expert_down": (E, F, d)}
    w = {name: rng.normal(size=shape, scale=0.3) for name, shape in shapes.items()}
    if config.router_bias:
        w["router_bias"] = rng.normal(size=E, scale=0.2)
    return {name: x.astype(np.float32) for name, x in w.items()}, rng.normal(size=(23, d)).astype(np.float32)


def by_the_equation(config, w, h, choices=None):
    """Token after token, expert after expert, in float64."""
    w = {name: x.astype(np.float64) for name, x in w.items()}
    out, used = np.zeros(h.shape), []
    for n, x in enumerate(h.astype(np.float64)):
        p = np.exp(x @ w["router"])
        p = p / p.sum()
        chosen = np.argsort(-(p + w.get("router_bias", 0)))[: config.experts_per_token]
        chosen = chosen if choices is None else choices[n]
        share = p[chosen]
        if config.norm_experts:
            share = share / max(share.sum(), config.expert_floor)
        for e, s in zip(chosen, share):
            gate = x @ w["expert_gate"][e]
            out[n] += s * ((gate / (1 + np.exp(-gate)) * (x @ w["expert_up"][e])) @ w["expert_down"][e])
        used.append(chosen)
    return out, np.array(used)


def close(got, expected, share=1e-5):
    np.testing.assert_allclose(got, expected, rtol=0, atol=share * np.abs(np.asarray(expected)).max())


mixture = jit(lambda config, *a: experts.mixture(config, a[0], a[1], jax.nn.silu, *a[2:]), static_argnums=0)


@CONFIGS
def test_the_sum_of_experts_is_the_equation(config):
    w, h = layer(config)
    y, choices, logits = mixture(config, w, h)
    expected, used = by_the_equation(config, w, h)
    close(y, expected)
    np.testing.assert_array_equal(choices, used)
    close(logits, h.astype(np.float64) @ w["router"])
    other = np.random.default_rng(1).permuted(np.tile(np.arange(config.experts), (len(h), 1)), axis=1)
    other = other[:, : config.experts_per_token].astype(np.int32)
    y, choices, _ = mixture(config, w, h, other)
    close(y, by_the_equation(config, w, h, other)[0])
    np.testing.assert_array_equal(choices, other)


def all_experts(config, w, h):
    """The same sum with every expert for every token, weights of 0 for those that are not chosen: easily derived."""
    _, used, _ = experts.mixture(config, w, h, jax.nn.silu)
    p = jax.nn.softmax(h @ w["router"])
    share = p * jax.nn.one_hot(used, config.experts).sum(1)
    if config.norm_experts:
        share = share / jnp.maximum(share.sum(-1, keepdims=True), config.expert_floor)
    gate, up = (jnp.einsum("nd,edf->nef", h, w[f"expert_{name}"]) for name in ("gate", "up"))
    return jnp.einsum("ne,nef,efd->nd", share, jax.nn.silu(gate) * up, w["expert_down"])


@CONFIGS
def test_gradients_are_those_of_the_sum_over_all_experts(config):
    w, h = layer(config)
    loss = lambda fn: jit(jax.grad(lambda w, h: jnp.sin(3 * fn(config, w, h)).sum(), (0, 1)))
    got = loss(lambda config, w, h: experts.mixture(config, w, h, jax.nn.silu)[0])(w, h)
    expected = loss(all_experts)(w, h)
    only_one = config.experts_per_token == 1 and config.norm_experts  # it weighs 1, whatever the router says
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected)):
        unmoved = path[-1].key == "router_bias" or (path[-1].key == "router" and only_one) if len(path) > 1 else False
        assert np.abs(b).max() < 1e-4 if unmoved else np.abs(b).max() > 0.1, path
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(np.abs(b).max(), 1), err_msg=str(path))


def test_nothing_is_added_into_scattered_rows():
    """Such additions come in any order on a GPU, so that a run could not be repeated bit by bit."""
    w, h = layer(PLAIN)
    loss = lambda w, h: (experts.mixture(PLAIN, w, h, jax.nn.silu)[0] ** 2).sum()
    program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(w, h)
    # XLA may write one as a loop, and keeps the name
    scatters = lambda text: re.search(r"\bscatter\(|stablehlo\.scatter|\bselect_and_scatter|/scatter", text)
    for text in (program.as_text(), program.compile().as_text()):
        assert "sort" in text and not scatters(text)
    plain = jax.jit(jax.grad(lambda h: (h[jnp.array([0, 0, 1])] ** 2).sum())).lower(h)
    assert scatters(plain.as_text()) and scatters(plain.compile().as_text())  # what the test would see


def test_the_router_is_float32_whatever_the_others_are():
    w, h = layer(ERNIE)
    coarse = {name: x.astype(jnp.bfloat16) for name, x in w.items() if "router" not in name}
    w = {name: coarse.get(name, jnp.asarray(x)) for name, x in w.items()}
    jaxpr = jax.make_jaxpr(lambda w, h: experts.mixture(ERNIE, w, h, jax.nn.silu))(w, h.astype(jnp.bfloat16))
    products = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    routers = [e for e in products if e.outvars[0].aval.shape == (len(h), ERNIE.experts)]
    assert len(routers) == 1 and routers[0].outvars[0].aval.dtype == np.float32
    assert set(routers[0].params["precision"]) == {jax.lax.Precision.HIGHEST}  # float32 on TPUs too
    y, choices, logits = mixture(ERNIE, w, h.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and logits.dtype == np.float32
    exact, used = by_the_equation(ERNIE, {n: np.asarray(x, np.float32) for n, x in w.items()},
                                  np.asarray(h.astype(jnp.bfloat16), np.float32))  # fmt: skip
    np.testing.assert_array_equal(choices, used)
    close(y, exact, 0.03)


# ---- groups of rows

SIZES = [[3, 0, 7, 1], [0, 0, 11, 0], [0, 5, 6, 0], [1, 1, 1, 8], [11, 0, 0, 0], [2, 3, 1, 0], [0, 0, 0, 0]]


def in_groups(seed=0, n=11, i=6, o=5):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, i)).astype(np.float32), rng.normal(size=(4, i, o)).astype(np.float32)


@functools.cache
def block_program(block):
    def loss(x, w, sizes, c):
        y = blocks._grouped(x, w, sizes, block)
        return (y * c).sum(), y

    return jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("block", [1, 3, 8, 16])
def test_rows_are_multiplied_with_their_group(sizes, block):
    x, w = in_groups()
    c = np.random.default_rng(1).normal(size=(11, 5)).astype(np.float32)
    (_, y), (dx, dw) = block_program(block)(x, w, np.int32(sizes), c)
    group = np.repeat(np.arange(4), sizes)
    expected = np.zeros((11, 5))
    expected_dx, expected_dw = np.zeros(x.shape), np.zeros(w.shape)
    for n, e in enumerate(group):  # rows beyond the groups are of none
        expected[n] = x[n].astype(np.float64) @ w[e]
        expected_dx[n] = w[e].astype(np.float64) @ c[n]
        expected_dw[e] += np.outer(x[n].astype(np.float64), c[n])
    for got, wanted in ((y, expected), (dx, expected_dx), (dw, expected_dw)):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)
    np.testing.assert_allclose(y, jax.lax.ragged_dot(x, w, np.int32(sizes)), rtol=0, atol=1e-5)


def test_blocks_are_batched_and_scanned():
    x, w = in_groups()
    c = np.ones((11, 5), np.float32)
    alone = [block_program(3)(x, w, np.int32(sizes), c)[1] for sizes in SIZES[:3]]
    loss = lambda sizes: jax.grad(lambda x, w: linear.grouped(x, w, sizes).sum(), (0, 1))(x, w)
    mapped = jit(jax.vmap(loss))(np.int32(SIZES[:3]))
    _, scanned = jit(lambda all: jax.lax.scan(lambda carry, sizes: (carry, loss(sizes)), 0, all))(np.int32(SIZES[:3]))
    for got in (mapped, scanned):
        for i, expected in enumerate(alone):
            for a, b in zip(got, expected):
                np.testing.assert_allclose(a[i], b, rtol=0, atol=1e-5)


def test_what_is_infinite_stays_in_its_group():
    x, w = in_groups()
    c, sizes = np.ones((11, 5), np.float32), np.int32([3, 0, 7, 1])
    (_, y), (dx, dw) = jax.tree.map(np.asarray, block_program(8)(x, w, sizes, c))
    for bad in (np.nan, np.inf):
        poisoned = x.copy()
        poisoned[3] = bad  # of group 2
        (_, other), (other_dx, other_dw) = jax.tree.map(np.asarray, block_program(8)(poisoned, w, sizes, c))
        np.testing.assert_array_equal(np.delete(other, 3, 0), np.delete(y, 3, 0))
        np.testing.assert_array_equal(other_dw[[0, 1, 3]], dw[[0, 1, 3]])
        np.testing.assert_array_equal(other_dx, dx)
        assert not np.isfinite(other_dw[2]).all()


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
def test_other_backends_keep_their_kernel(backend, monkeypatch):
    x, w = in_groups()
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    jaxpr = jax.make_jaxpr(lambda x, w, sizes: linear.grouped(x, w, sizes))(x, w, np.int32(SIZES[0]))
    assert any("ragged_dot" in e.primitive.name for e in equations(jaxpr.jaxpr)) == (backend != "cpu")


def test_bfloat16_groups_are_close_and_sum_in_float32():
    x, w = in_groups(n=640, i=8)
    sizes = np.int32([600, 0, 40, 0])
    loss = lambda x, w: linear.grouped(x, w, sizes).astype(jnp.float32).sum()
    y = linear.grouped(jnp.bfloat16(x), jnp.bfloat16(w), sizes)
    dw = jax.grad(loss, 1)(jnp.bfloat16(x), jnp.bfloat16(w))
    assert y.dtype == dw.dtype == jnp.bfloat16
    exact = np.asarray(jnp.bfloat16(x), np.float64)[:600].sum(0)
    # summed one by one in bfloat16, 600 numbers would be off by far more
    np.testing.assert_allclose(np.asarray(dw, np.float32)[0, :, 0], exact, rtol=0.01, atol=0.05)


# ---- in the decoder

forward = jit(lambda config, *a, **k: decoder.forward(config, *a, **k), static_argnums=0, static_argnames="how")


@CONFIGS
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(config, side):
    """Experts work on padding too; nobody sees it."""
    params = weights(config)
    tokens, seen, starts = padded(rows(), {"left": lambda n: n, "right": lambda n: 0}[side])
    out = forward(config, params, tokens, seen)
    other = np.where(seen, tokens, (tokens + 11) % config.vocab)
    again = forward(config, params, other, seen)
    close(np.asarray(out.hidden)[seen], np.asarray(again.hidden)[seen], 1e-6)
    np.testing.assert_array_equal(np.asarray(out.routing.choices)[:, seen], np.asarray(again.routing.choices)[:, seen])
    for i, (row, start) in enumerate(zip(rows(), starts)):
        alone = forward(config, params, np.pad(row, (0, 12 - len(row)))[None], (np.arange(12) < len(row))[None])
        close(out.hidden[i, start : start + len(row)], alone.hidden[0, : len(row)], 1e-5)


def test_the_routing_has_a_layer_for_each_that_has_experts():
    tokens, seen, _ = padded(rows(), lambda n: n)
    routing = forward(MIXED, weights(MIXED), tokens, seen).routing
    assert routing.logits.shape == (3, *tokens.shape, 5) and routing.choices.shape == (3, *tokens.shape, 3)
    heaviest_first = np.take_along_axis(np.asarray(routing.logits), np.asarray(routing.choices), -1)
    assert (np.diff(heaviest_first, axis=-1) <= 0).all()


@CONFIGS
def test_the_program_does_not_grow_with_the_experts_nor_with_neighbouring_layers(config):
    size = lambda config: len([
        *equations(jax.make_jaxpr(functools.partial(decoder.apply, config))(
            jax.eval_shape(lambda: weights(config)), np.zeros((2, 5), np.int32), np.ones((2, 5), bool)).jaxpr)
    ])  # fmt: skip
    more = dataclasses.replace(config, experts=2 * config.experts)
    has = config.expert_layers
    if has:
        more = dataclasses.replace(more, layers=len(has) + 2, expert_layers=(*has[:1] * 2, *has[1:], has[-1]))
    assert size(config) == size(more)


@pytest.mark.parametrize("remat", ["layer", "dots"])
def test_computing_again_chooses_the_same_experts(remat):
    expected, got = gradient(PLAIN, Execution()), gradient(PLAIN, Execution(remat=remat))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1e-3))


@functools.cache
def gradient(config, how):
    params, (tokens, seen, _) = weights(config), padded(rows(), lambda n: n)
    loss = lambda p: jnp.sin(decoder.forward(config, p, tokens, seen, how=how).hidden).sum(where=seen[..., None])
    return jit(jax.grad(loss))(params)


# ---- replay


def disturbed(params, seed=5):
    """The same model a few updates later: its routers would choose otherwise."""
    router = params["layers"]["router"]
    noise = np.random.default_rng(seed).normal(size=router.shape).astype(np.float32)
    return params | {"layers": params["layers"] | {"router": router + 0.3 * noise}}


@CONFIGS
def test_the_same_choices_give_the_same_numbers_bit_by_bit(config):
    params, (tokens, seen, _) = weights(config), padded(rows(), lambda n: n)
    out = forward(config, params, tokens, seen)
    own = np.full_like(out.routing.choices, -1)
    again = forward(config, params, tokens, seen, routes=out.routing.choices)
    undecided = forward(config, params, tokens, seen, routes=own)
    for other in (again, undecided):
        np.testing.assert_array_equal(out.hidden, other.hidden)
        np.testing.assert_array_equal(out.routing.choices, other.routing.choices)


@CONFIGS
def test_choices_are_replayed_and_the_weights_are_the_trainers(config):
    params, (tokens, seen, _) = weights(config), padded(rows(), lambda n: n)
    routes = forward(config, params, tokens, seen).routing.choices
    later = disturbed(params)
    free, replayed = forward(config, later, tokens, seen), forward(config, later, tokens, seen, routes=routes)
    assert (np.asarray(free.routing.choices) != np.asarray(routes)).any(-1).mean() > 0.2
    np.testing.assert_array_equal(replayed.routing.choices, routes)
    if config.experts_per_token > 1 or not config.norm_experts:
        first = sum(config.has_experts[: config.has_experts.index(True) + 1]) - 1
        np.testing.assert_array_equal(replayed.routing.logits[first], free.routing.logits[first])
    assert np.abs(np.asarray(replayed.hidden - free.hidden))[seen].max() > 0.01


@CONFIGS
def test_the_cache_remembers_what_was_chosen(config):
    params, (tokens, seen, _) = weights(config), padded(rows(), lambda n: n)
    expected = forward(config, params, tokens, seen).routing.choices
    cache = init_cache(config, len(tokens), 14)
    for part in np.split(np.arange(12), [7, 8, 9, 10, 11]):
        cache = forward(config, params, tokens[:, part], seen[:, part], cache).cache
    assert cache["routes"].shape == (*expected.shape[:2], 14, expected.shape[3])
    np.testing.assert_array_equal(np.asarray(cache["routes"])[:, :, :12][:, seen], np.asarray(expected)[:, seen])


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (PLAIN, (2, 4, 12), r"^routes has shape \(2, 4, 12\), expected \[M, B, T, K\]"),
        (PLAIN, (2, 4, 11, 2), r"^routes has shape .* with T=12 \(from tokens\)"),
        (PLAIN, (1, 4, 12, 2), r"^routes has shape .* M=2 layers that have experts and K=2 experts a token"),
        (PLAIN, (2, 4, 12, 3), r"^routes has shape .* M=2 layers that have experts and K=2 experts a token"),
        (dataclasses.replace(PLAIN, experts=0), (2, 4, 12, 2), "this model has no experts"),
    ],
)
def test_routes_of_another_model_are_refused(config, shape, message):
    tokens, seen, _ = padded(rows(), lambda n: n)
    with pytest.raises(ValueError, match=message):
        decoder.forward(config, {}, tokens, seen, routes=np.zeros(shape, np.int32))
