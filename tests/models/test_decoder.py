"""The decoder against its equations in plain numpy, and what padding, caches, depth and dtypes must not change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import LENGTHS, VOCAB, T, equations, jit, padded, rows, weights

from pt_jax.models import decoder, parameters
from pt_jax.models.cache import init_cache
from pt_jax.models.config import Config

# Odd on purpose: heads * head_width is not the width, eps and base are far from every default
QWEN = Config(
    vocab=VOCAB, layers=3, width=20, heads=6, kv_heads=2, head_width=4, hidden=18, rope_base=5e5, eps=1e-2, tied=False
)
ONE_KV_HEAD = dataclasses.replace(QWEN, layers=2, heads=3, kv_heads=1, head_width=10, tied=True)
LLAMA = dataclasses.replace(QWEN, layers=2, heads=3, kv_heads=3, rope_base=10_000.0, qk_norm=False)
CONFIGS = pytest.mark.parametrize("config", [QWEN, ONE_KV_HEAD, LLAMA], ids=["qwen3", "one_kv_head", "llama"])

forward = jit(lambda config, *a: decoder.apply(config, *a)[0], static_argnums=0)
append = jit(decoder.apply, static_argnums=0)


SIDES = {"left": lambda n: n, "right": lambda n: 0, "both": lambda n: n // 2}


def by_the_equation(config, params, tokens):
    """Logits of one text without padding, in float64, head after head."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    norm = lambda x, gain: x / np.sqrt((x**2).mean(-1, keepdims=True) + config.eps) * gain
    n, c = len(tokens), config.head_width
    angle = np.arange(n)[:, None] * config.rope_base ** (-np.arange(c // 2) * 2 / c)

    def rotate(x):  # (i, i + c / 2) is one complex number
        turned = (x[:, : c // 2] + 1j * x[:, c // 2 :]) * np.exp(1j * angle)
        return np.concatenate([turned.real, turned.imag], -1)

    x = p["embed"][tokens]
    for i in range(config.layers):
        w = {name: stacked[i] for name, stacked in p["layers"].items()}
        h, attended = norm(x, w["attn_norm"]), 0
        for head in range(config.heads):
            shared = head // (config.heads // config.kv_heads)
            q, k, v = h @ w["wq"][:, head], h @ w["wk"][:, shared], h @ w["wv"][:, shared]
            if config.qk_norm:
                q, k = norm(q, w["q_norm"]), norm(k, w["k_norm"])
            score = rotate(q) @ rotate(k).T / np.sqrt(c)
            score = np.exp(np.where(np.tril(np.ones((n, n))) > 0, score, -np.inf))
            attended = attended + score / score.sum(-1, keepdims=True) @ v @ w["wo"][head]
        x = x + attended
        h = norm(x, w["mlp_norm"])
        gate = h @ w["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["up"])) @ w["down"]
    return norm(x, p["norm"]) @ (p["embed"] if config.tied else p["unembed"]).T


def assert_close(got, expected, share=2e-5):
    np.testing.assert_allclose(got, expected, rtol=0, atol=share * np.abs(expected).max())


# ---- the arithmetic, and padding


@CONFIGS
@pytest.mark.parametrize("side", SIDES)
def test_a_padded_row_has_the_logits_of_the_row_alone(config, side):
    params = weights(config)
    tokens, seen, starts = padded(rows(), SIDES[side])
    got = np.asarray(forward(config, params, tokens, seen))
    assert got.shape == (len(LENGTHS), T, config.vocab) and got.dtype == np.float32
    for logits, row, start in zip(got, rows(), starts):
        assert_close(logits[start : start + len(row)], by_the_equation(config, params, row))


@pytest.mark.parametrize("side", SIDES)
def test_a_text_longer_than_the_learned_positions_is_not_a_number(side):
    """transformers fails there, which a compiled program cannot: and no number that looks like a logit comes out."""
    config = dataclasses.replace(
        QWEN, family="gpt2", learned_positions=True, max_length=LENGTHS[1], norm="layer", kv_heads=6, qk_norm=False
    )
    params = weights(config)
    tokens, seen, starts = padded(rows(), SIDES[side])
    got = np.asarray(forward(config, params, tokens, seen))
    assert LENGTHS[0] > config.max_length and np.isnan(got[0][seen[0]][-1]).all()
    for i in range(1, len(LENGTHS)):
        alone = forward(config, params, rows()[i][None], np.ones((1, LENGTHS[i]), bool))
        assert_close(got[i, starts[i] : starts[i] + LENGTHS[i]], np.asarray(alone)[0])


@CONFIGS
@pytest.mark.parametrize("side", SIDES)
def test_what_stands_in_padding_influences_nothing(config, side):
    params, outputs = weights(config), []
    for fill in (0, 17):
        tokens, seen, _ = padded(rows(), SIDES[side], fill)
        outputs.append(np.asarray(forward(config, params, tokens, seen))[seen])
    np.testing.assert_array_equal(*outputs)


@CONFIGS
def test_a_later_token_changes_nothing_before_it(config):
    params = weights(config)
    tokens, seen, _ = padded(rows(), SIDES["right"])
    before = np.asarray(forward(config, params, tokens, seen))
    for t in (1, 6, T - 1):
        changed = tokens.copy()
        changed[:, t:] = (changed[:, t:] + 5) % config.vocab
        after = np.asarray(forward(config, params, changed, seen))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (after[0, t] != before[0, t]).any()


def test_rows_do_not_see_each_other():
    params = weights(QWEN)
    tokens, seen, _ = padded(rows(), SIDES["left"])
    order = np.array([2, 0, 3, 1])
    np.testing.assert_array_equal(
        forward(QWEN, params, tokens[order], seen[order]), np.asarray(forward(QWEN, params, tokens, seen))[order]
    )


def test_a_row_of_padding_alone_is_finite_and_so_are_gradients():
    params = weights(QWEN)
    tokens, seen, _ = padded(rows(), SIDES["left"])
    expected = np.asarray(forward(QWEN, params, tokens, seen))
    empty = seen & (np.arange(len(tokens)) != 1)[:, None]
    logits = np.asarray(forward(QWEN, params, tokens, empty))
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(logits[[0, 2, 3]], expected[[0, 2, 3]])
    loss = lambda params, seen: jnp.where(seen, decoder.apply(QWEN, params, tokens, seen)[0].max(-1), 0).sum()
    for gradient in jax.tree.leaves(jit(jax.grad(loss))(params, empty)):
        assert np.isfinite(gradient).all() and (gradient != 0).any()


# ---- the cache


@CONFIGS
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_read_in_parts_has_the_logits_of_the_whole(config, side):
    params = weights(config)
    tokens, seen, _ = padded(rows(), SIDES[side])
    expected = np.asarray(forward(config, params, tokens, seen))
    for parts in [(1, 11), (11, 1), (1,) * T] + ([(4, 4, 4), (4, 1, 1, 1, 1, 4)] if config is QWEN else []):
        cache, logits = init_cache(config, len(tokens), T + 3), []
        cache |= {"k": cache["k"] + 1e3, "v": cache["v"] - 1e3}  # what is not yet written must not be seen
        for part in np.split(np.arange(T), np.cumsum(parts)[:-1]):
            out, cache = append(config, params, tokens[:, part], seen[:, part], cache)
            logits.append(np.asarray(out))
        assert_close(np.concatenate(logits, 1)[seen], expected[seen], 1e-5)
        assert int(cache["end"]) == T
        np.testing.assert_array_equal(cache["position"] >= 0, np.pad(seen, ((0, 0), (0, 3))))
        np.testing.assert_array_equal(cache["k"][..., T:], 1e3)


def test_the_cache_that_is_handed_in_is_not_changed():
    """A prompt is read once, and completed many times from there."""
    params, (tokens, seen, _) = weights(QWEN), padded(rows(), SIDES["left"])
    _, cache = append(QWEN, params, tokens[:, :11], seen[:, :11], init_cache(QWEN, 4, T + 3))
    one, _ = append(QWEN, params, tokens[:, 11:], seen[:, 11:], cache)
    append(QWEN, params, tokens[:, :1], seen[:, 11:], cache)
    again, _ = append(QWEN, params, tokens[:, 11:], seen[:, 11:], cache)
    np.testing.assert_array_equal(one, again)


def test_without_a_cache_there_is_none_to_return():
    tokens, seen, _ = padded(rows(), SIDES["left"])
    assert jax.eval_shape(functools.partial(decoder.apply, QWEN), weights(QWEN), tokens, seen)[1] is None


# ---- the program


def programs(config, dtype=jnp.float32):
    """Forward, backward and decoding, traced only."""
    params = jax.eval_shape(lambda: parameters.init(config, jax.random.key(0), dtype))
    cache = jax.eval_shape(lambda: init_cache(config, 2, 8, dtype))
    tokens, seen = jax.ShapeDtypeStruct((2, 5), jnp.int32), jax.ShapeDtypeStruct((2, 5), bool)
    apply = functools.partial(decoder.apply, config)
    grad = jax.grad(lambda *a: apply(*a)[0].astype(jnp.float32).sum())
    yield "forward", jax.make_jaxpr(apply)(params, tokens, seen)
    yield "backward", jax.make_jaxpr(grad)(params, tokens, seen)
    yield "decoding", jax.make_jaxpr(apply)(params, tokens, seen, cache)


def test_the_program_does_not_grow_with_depth():
    size = lambda layers: {
        name: len([*equations(jaxpr.jaxpr)]) for name, jaxpr in programs(dataclasses.replace(QWEN, layers=layers))
    }
    two = size(2)
    assert min(two.values()) > 50  # the blocks were counted, and not only the scan around them
    assert two == size(6)


@pytest.mark.parametrize("config", [QWEN, LLAMA], ids=["qwen3", "llama"])
def test_norms_positions_and_softmax_are_float32_whatever_the_weights(config):
    delicate = {"rsqrt", "exp", "cos", "sin", "pow", "integer_pow", "square"}
    for name, jaxpr in programs(config, jnp.bfloat16):
        found = [e for e in equations(jaxpr.jaxpr) if e.primitive.name in delicate]
        assert {"rsqrt", "exp", "cos", "sin"} <= {e.primitive.name for e in found}
        for e in found:
            assert {v.aval.dtype for v in e.invars if hasattr(v, "aval")} == {np.dtype(np.float32)}, f"{name}: {e}"


@pytest.mark.parametrize("config", [QWEN, LLAMA], ids=["qwen3", "llama"])
def test_bfloat16_weights_give_bfloat16_logits_that_are_close(config):
    coarse = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights(config))
    tokens, seen, _ = padded(rows(), SIDES["left"])
    got = forward(config, coarse, tokens, seen)
    assert got.dtype == jnp.bfloat16
    exact = np.asarray(forward(config, jax.tree.map(lambda x: x.astype(jnp.float32), coarse), tokens, seen))
    error = np.abs(np.asarray(got, np.float32) - exact)[seen]
    assert error.max() < 0.05 * np.abs(exact).max() and error.mean() < 0.01 * np.abs(exact).max()


# ---- parameters


@CONFIGS
def test_the_parameters_have_the_shapes_of_the_module_docstring(config):
    d, h, k, c = config.width, config.heads, config.kv_heads, config.head_width
    L, f, v = config.layers, config.hidden, config.vocab
    layers = {"attn_norm": (L, d), "wq": (L, d, h, c), "wk": (L, d, k, c), "wv": (L, d, k, c), "wo": (L, h, c, d)}
    layers |= {"mlp_norm": (L, d), "gate": (L, d, f), "up": (L, d, f), "down": (L, f, d)}
    layers |= {"q_norm": (L, c), "k_norm": (L, c)} if config.qk_norm else {}
    expected = {"embed": (v, d), "norm": (d,), "layers": layers} | ({} if config.tied else {"unembed": (v, d)})
    params = jax.eval_shape(lambda: parameters.init(config, jax.random.key(0)))
    assert jax.tree.map(lambda x: x.shape, params) == expected
    sizes = jax.tree.leaves(jax.tree.map(lambda x: x.size, params))
    assert parameters.count(params) == sum(sizes)


def test_fresh_parameters_are_as_described_and_no_two_alike():
    config = dataclasses.replace(QWEN, layers=8, width=64, heads=8, kv_heads=8, head_width=8, hidden=64, vocab=64)
    params = jit(lambda key: parameters.init(config, key, jnp.float32))(jax.random.key(3))
    flat = {path[-1].key: np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
    for name, x in flat.items():
        if name.endswith("norm"):
            assert (x == 1).all()
        else:
            deviation = 0.02 / np.sqrt(2 * 8) if name in ("wo", "down") else 0.02
            assert abs(x.mean()) < 0.05 * deviation and abs(x.std() / deviation - 1) < 0.05, name
    drawn = [x.ravel()[:64] / x.std() for x in flat.values() if x.std()]
    drawn += [layer.ravel()[:64] / layer.std() for layer in flat["wq"]]
    similar = np.abs(np.corrcoef(drawn)) > 0.9
    assert similar.sum() == len(drawn) + 2  # wq as a whole begins with its layer 0


def test_the_key_and_the_dtype_of_fresh_parameters_count():
    make = jit(lambda seed: parameters.init(LLAMA, jax.random.key(seed)))
    one, same, other = make(0), make(0), make(1)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, one, same)))
    assert not np.array_equal(one["layers"]["wq"], other["layers"]["wq"])
    for dtype in (jnp.float32, jnp.bfloat16):
        shapes = jax.eval_shape(lambda dtype=dtype: parameters.init(LLAMA, jax.random.key(0), dtype))
        assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("change", [{"rope_base": 1e4}, {"eps": 1e-6}], ids=str)
def test_the_numbers_of_the_config_reach_the_logits(change):
    tokens, seen, _ = padded(rows(), SIDES["right"])
    got = [forward(c, weights(QWEN), tokens, seen)[seen] for c in (QWEN, dataclasses.replace(QWEN, **change))]
    assert np.abs(got[0] - got[1]).max() > 0.01


# ---- the parts, and mistakes


def test_apply_is_unembed_of_hidden():
    tokens, seen, _ = padded(rows(), SIDES["left"])
    whole = forward(QWEN, weights(QWEN), tokens, seen)
    x, cache = jit(decoder.hidden, static_argnums=0)(QWEN, weights(QWEN), tokens, seen)
    assert x.shape == (len(LENGTHS), T, QWEN.width) and cache is None
    assert_close(decoder.unembed(QWEN, weights(QWEN), x), whole, 1e-6)


def test_a_bound_model_is_one_object():
    """Static functions are compared by identity: a new partial a call would be a new trace a call."""
    bound = decoder.bind(QWEN)
    again = decoder.bind(dataclasses.replace(QWEN))
    assert bound.apply is again.apply and bound.init_cache is again.init_cache
    assert bound.apply is not decoder.bind(LLAMA).apply
    cache = jax.eval_shape(lambda: bound.init_cache(2, 9))
    assert cache["k"].shape == (3, 2, 2, 4, 9) and cache["position"].shape == (2, 9)


@pytest.mark.parametrize(
    ("tokens", "seen", "message"),
    [
        ((4,), (4,), r"^tokens has shape \(4,\), expected \[B, T\]$"),
        ((2, 4), (4,), r"^seen has shape \(4,\), expected \[B, T\]$"),
        ((2, 4), (2, 5), r"^seen has shape \(2, 5\), expected \[B, T\] with T=4 \(from tokens\)$"),
        ((2, 4), (1, 4), r"^seen has shape \(1, 4\), expected \[B, T\] with B=2 \(from tokens\)$"),
    ],
)
def test_shapes_that_disagree_are_a_sentence(tokens, seen, message):
    for cache in (None, init_cache(QWEN, 2, 8)):
        with pytest.raises(ValueError, match=message):
            decoder.apply(QWEN, weights(QWEN), np.zeros(tokens, np.int32), np.ones(seen, bool), cache)
