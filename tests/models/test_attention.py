"""Attention against float64 loops, its programs against each other, and which of them is taken.

cuDNN's kernel runs on NVIDIA's GPUs alone. What is handed to it is tested by the program that
``jax.nn.dot_product_attention`` documents as its equal: ``implementation="xla"``, given the same arguments.

Measured on these cases, as shares of the largest number: splash (interpreted) against the plain program, logits 6e-7,
gradients 3e-6 in float32; 1.3e-2 and 3.1e-2 in bfloat16. The tolerances are three times and twice that.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from small_models import jit

from pt_jax.models import Config, Execution, apply, attention, forward, init_cache, tiles

QWEN = Config(vocab=29, layers=2, width=20, heads=6, kv_heads=2, head_width=8, hidden=18, eps=1e-2, tied=False)
KINDS = {
    "plain": QWEN,
    "one window": dataclasses.replace(QWEN, windows=(5, 5), kv_heads=6),
    "two windows, two ropes": dataclasses.replace(QWEN, layers=3, windows=(3, 0, 5), local_rope_base=30.0),
    "a soft-cap, a scale a layer": dataclasses.replace(
        QWEN, kv_heads=1, attention_softcap=2.0, attention_scale=0.6, scale_by_layer=True
    ),
    "experts": dataclasses.replace(QWEN, experts=4, expert_hidden=6, expert_layers=(False, True)),
}
T, LENGTHS = 21, (21, 13, 1, 8)
SEEN = {
    "right": np.arange(T) < np.array(LENGTHS)[:, None],
    "left": np.arange(T) >= T - np.array(LENGTHS)[:, None],
    "both": (np.arange(T) >= 4) & (np.arange(T) < 4 + np.array((17, 9, 0, 5))[:, None]),
    "texts": np.int32([[1] * 9 + [2] * 12, [0] * 2 + [3] * 7 + [1] * 8 + [0] * 4, [0] * 21, [5] * 21]),
}
TOKENS = np.random.default_rng(2).integers(0, 29, (4, T + 1)).astype(np.int32)
weights = functools.partial(small_models.weights, scale=0.3)


@functools.partial(jit, static_argnums=(0, 1))
def computed(config, how, params, seen):
    """Logits of what is seen, and the gradient of a sum that needs all of them."""

    def total(params):
        logits = apply(config, params, TOKENS[:, : seen.shape[1]], seen, how=how)[0].astype(jnp.float32)
        logits = jnp.where(seen[..., None] != 0, logits, 0)
        return jnp.sin(logits).sum(), logits

    gradient, logits = jax.grad(total, has_aux=True)(params)
    return logits, gradient


def close(got, expected, share):
    expected = np.asarray(expected, np.float32)
    np.testing.assert_allclose(np.asarray(got, np.float32), expected, rtol=0, atol=share * np.abs(expected).max())


def compare(config, how, seen, of_logits, of_gradients, params=None):
    params = weights(config) if params is None else params
    expected, of_plain = computed(config, dataclasses.replace(how, attention="plain"), params, seen)
    got, gradient = computed(config, how, params, seen)
    assert np.abs(expected).max() > 1
    close(got, expected, of_logits)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(of_plain)):
        close(a, b, of_gradients)


# ---- by the equation


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 4)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [0, 3])
def test_every_program_computes_the_equation(window, softcap, small_tiles):
    """In float64, query after query: a window of three is the token itself and two before it."""
    rng, n = np.random.default_rng(1), 11
    q, k, v = (rng.normal(size=(2, n, heads, 8)) for heads in (6, 2, 2))
    expected = np.zeros_like(q)
    for b, t, h in np.ndindex(2, n, 6):
        keys = slice(max(0, t - window + 1) if window else 0, t + 1)
        scores = 0.7 * k[b, keys, h // 3] @ q[b, t, h]
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        share = np.exp(scores - scores.max())
        expected[b, t, h] = share / share.sum() @ v[b, keys, h // 3]
    back = np.arange(n)[:, None] - np.arange(n)
    visible = jnp.asarray((back >= 0) & ((back < window) | (window == 0)))[None, None]
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    for name in ("plain", "tiles"):
        close(attention.of_mask(name, visible, scale=0.7, softcap=softcap)(q, k, v), expected, 1e-6)
    close(attention.of_window("splash", window, scale=0.7, softcap=softcap)(q, k, v), expected, 1e-6)


@pytest.mark.parametrize("name", ["plain", "tiles"])
def test_what_is_hidden_has_no_share_and_no_gradient(name, small_tiles):
    rng = np.random.default_rng(4)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 6, heads, 4)), jnp.float32) for heads in (4, 2, 2))
    visible = jnp.asarray((rng.integers(0, 2, (2, 1, 6, 6)) > 0) & np.tri(6, dtype=bool))
    visible = visible.at[:, :, :, 2].set(False).at[:, :, 4].set(False)
    far = k.at[:, 2].set(1e9), v.at[:, 2].set(-1e9)
    asked = visible.any(-1)[:, 0, :, None, None]  # query 4, and others, see nothing and have no meaning
    for softcap in (None, 2.0):
        of = attention.of_mask(name, visible, scale=0.5, softcap=softcap)
        total = lambda k, v, of=of: jnp.where(asked, jnp.sin(of(q, k, v)), 0).sum()
        np.testing.assert_array_equal(*(np.where(asked, of(q, *kv), 0) for kv in (far, (k, v))))
        assert np.isfinite(of(q, k, v)).all()
        for gradient in jax.grad(total, (0, 1))(*far):
            assert (gradient[:, 2] == 0).all() and np.isfinite(gradient).all()


# ---- tiles


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_compute_what_the_plain_program_computes(kind, small_tiles):
    compare(KINDS[kind], Execution(attention="tiles"), SEEN["texts" if kind == "experts" else "left"], 2e-6, 1e-5)


def test_tiles_compute_in_sixteen_bits(small_tiles):
    how = Execution(attention="tiles", dtype="bfloat16")
    compare(KINDS["two windows, two ropes"], how, SEEN["both"], 4e-2, 6e-2)


@pytest.mark.parametrize("length", [1, 127, 129, 1000, 5000])
def test_tiles_are_few_and_cover_every_query_once(length):
    cut = tiles._tiles(length)
    assert [i for first, end in cut for i in range(first, end)] == list(range(length)) and len(cut) <= tiles.MOST


def test_tiles_keep_no_scores_for_the_backward_pass():
    """Of 4 tiles, the scores of one at a time, against those of all queries, several times over."""
    q, k, v = (jax.ShapeDtypeStruct((1, 512, heads, 8), jnp.float32) for heads in (8, 2, 2))
    visible = jnp.tri(512, dtype=bool)[None, None]

    def bytes_of(name):
        total = lambda *x: jnp.sin(attention.of_mask(name, visible, scale=0.5)(*x)).sum()
        return jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    assert bytes_of("tiles") < bytes_of("plain") / 2


# ---- splash


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


# every kind, and every form of rows; not each with each, which would take a minute to compile
PAIRS = [("plain", "left"), ("one window", "texts"), ("two windows, two ropes", "texts"), ("experts", "texts")]
PAIRS += [("a soft-cap, a scale a layer", "left"), *(("two windows, two ropes", x) for x in ("left", "right", "both"))]


@pytest.mark.parametrize(("kind", "side"), PAIRS)
def test_splash_computes_what_the_plain_program_computes(kind, side, one_device):
    compare(KINDS[kind], Execution(attention="splash"), SEEN[side], 2e-6, 1e-5)


def test_splash_in_bfloat16(one_device):
    coarse = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights(QWEN))
    compare(QWEN, Execution(attention="splash"), SEEN["left"], 2e-2, 6e-2, coarse)


@pytest.mark.parametrize("length", [128, 200, 640])
def test_splash_takes_rows_of_any_length(length):
    """Filled up to whole blocks, of 512 where they fit; longer than one block, so that whole blocks are skipped."""
    rng = np.random.default_rng(6)
    q, k, v = (jnp.asarray(rng.normal(size=(1, length, heads, 8)), jnp.float32) for heads in (2, 1, 1))
    texts = jnp.asarray(np.sort(rng.integers(1, 4, (1, length))), jnp.int32)
    visible = (texts[:, None, :, None] == texts[:, None, None, :]) & jnp.tri(length, dtype=bool)[None, None]
    expected = attention.of_mask("plain", visible, scale=0.5)(q, k, v)
    close(attention.of_window("splash", 0, scale=0.5, texts=texts)(q, k, v), expected, 1e-6)


def test_splash_splits_rows_and_heads_by_the_mesh(monkeypatch):
    """And does not move them: each of four devices computes a quarter of the rows and heads."""
    mesh = jax.make_mesh(
        (2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )
    expected, of_one = computed(QWEN, Execution(attention="plain"), weights(QWEN), SEEN["left"])
    with jax.set_mesh(mesh):
        seen = jax.device_put(SEEN["left"], jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
        params = jax.device_put(weights(QWEN), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        got, gradient = computed(QWEN, Execution(attention="splash"), params, seen)
        jaxpr = str(
            jax.make_jaxpr(lambda p: apply(QWEN, p, TOKENS[:, :T], seen, how=Execution(attention="splash"))[0])(params)
        )
    assert "shard_map" in jaxpr
    close(got, expected, 1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(of_one)):
        close(a, b, 1e-5)


# ---- cuDNN, by its documented equal


@pytest.fixture
def documented(monkeypatch):
    """Records what is asked of cuDNN, and lets XLA compute it; in float32, where a mistake is larger than rounding."""
    asked, of = [], jax.nn.dot_product_attention

    def instead(*args, implementation, **kwargs):
        if implementation == "cudnn":
            asked.append(kwargs)
        return of(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    monkeypatch.setattr(attention, "_against_cudnn", lambda *_: None)
    return asked


CUDNN = Execution(attention="cudnn")


@pytest.mark.parametrize("kind", ["one window", "two windows, two ropes"])
def test_cudnn_is_asked_for_the_same_attention_without_a_mask(documented, kind):
    config = KINDS[kind]
    for side in ("left", "both"):
        compare(config, CUDNN, SEEN[side], 2e-6, 1e-5)
    windows = {w or None for w in config.windows} or {None}
    assert {kw["local_window_size"] and kw["local_window_size"][0] + 1 for kw in documented} == windows
    for kw in documented:
        assert kw["is_causal"] and "mask" not in kw and kw["scale"] == 8**-0.5
        assert kw["local_window_size"] is None or kw["local_window_size"][1] == 0


def test_cudnn_is_handed_a_mask_of_packed_rows_and_that_they_are_causal(documented):
    compare(KINDS["two windows, two ropes"], CUDNN, np.pad(SEEN["texts"], ((0, 0), (0, 1))), 2e-6, 1e-5)
    assert documented and all(kw["is_causal"] and kw["mask"].shape == (4, 1, 22, 22) for kw in documented)


def test_cudnn_reads_a_cache_by_a_mask(documented):
    config, seen = KINDS["one window"], SEEN["left"][:, 1:]
    tokens = TOKENS[:, 1:T]
    of = lambda how: apply(config, weights(config), tokens, seen, init_cache(config, 4, 24), how=how)[0]
    got, expected = (jnp.where(seen[..., None], of(how), 0) for how in (CUDNN, Execution(attention="plain")))
    close(got, expected, 2e-6)
    assert documented and not any("is_causal" in kw for kw in documented)


# ---- which is taken

SOFTCAP, BY_LAYER = (dataclasses.replace(QWEN, **x) for x in ({"attention_softcap": 2.0}, {"scale_by_layer": True}))


def chosen(config=QWEN, how="auto", dtype="bfloat16", length=20, seen=None, cached=False):
    seen = np.ones((2, length), bool) if seen is None else seen
    return attention.kernel(config, how, dtype=jnp.dtype(dtype), seen=seen, cached=cached)


def test_auto_takes_the_best_that_computes_it(monkeypatch):
    packed, branches = np.ones((2, 20), np.int32), np.ones((2, 20, 2), np.int32)
    assert chosen() == chosen(SOFTCAP) == chosen(seen=branches) == chosen(BY_LAYER, dtype="float32") == "tiles"
    assert chosen(cached=True) == "plain"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert chosen() == chosen(seen=packed) == chosen(seen=branches) == chosen(cached=True) == "cudnn"
    assert chosen(length=21) == "cudnn"
    assert chosen(dtype="float32") == "plain"
    assert chosen(SOFTCAP) == chosen(BY_LAYER) == "plain"
    assert (
        chosen(dataclasses.replace(QWEN, head_width=4)) == chosen(dataclasses.replace(QWEN, head_width=136)) == "plain"
    )
    assert chosen(seen=packed[:, :19]) == "plain"
    assert chosen(cached=True, length=1) == "plain"
    monkeypatch.setattr(attention, "_hopper", lambda: True)
    assert chosen(dataclasses.replace(QWEN, head_width=256)) == "cudnn"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert chosen() == chosen(seen=packed) == chosen(SOFTCAP, dtype="float32", length=21) == "splash"
    assert chosen(seen=branches) == chosen(cached=True) == "plain"
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert chosen() == "plain"


REFUSED = {
    r"^attention='cudnn' does not compute in float32, only in bfloat16 and float16; use attention='auto'$": {
        "how": "cudnn", "dtype": "float32",
    },
    "^attention='cudnn' does not know a soft-cap": {"how": "cudnn", "config": SOFTCAP},
    "^attention='cudnn' does not know a soft-cap, nor a scale a layer": {
        "how": "cudnn", "config": BY_LAYER,
    },
    "^attention='cudnn' takes heads of a multiple of 8 numbers, up to 128, not of 12": {
        "how": "cudnn", "config": dataclasses.replace(QWEN, head_width=12),
    },
    "^attention='cudnn' takes packed rows of an even number of tokens, not of 7": {
        "how": "cudnn", "seen": np.ones((2, 7), np.int32),
    },
    "^attention='splash' does not continue a cache": {"how": "splash", "cached": True},
    "^attention='splash' does not know texts that share their beginning": {
        "how": "splash", "seen": np.ones((2, 6, 2), np.int32),
    },
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_program_does_not_compute_is_refused_in_a_sentence(message):
    with pytest.raises(ValueError, match=message):
        chosen(**REFUSED[message])


def test_splash_on_several_devices_asks_for_their_mesh(monkeypatch):
    with pytest.raises(
        ValueError, match=r"^attention='splash' splits its work over devices by the mesh of jax.set_mesh"
    ):
        chosen(how="splash")


def test_the_experts_of_a_row_are_those_of_its_own_order(one_device):
    """A fused program computes rows with their padding behind; routes go in and come out where the tokens are."""
    config, seen, tokens = KINDS["experts"], SEEN["left"], TOKENS[:, :T]
    routes = np.random.default_rng(8).permuted(np.tile(np.arange(4, dtype=np.int32), (1, 4, T, 1)), axis=-1)[..., :2]
    plain, fused = (
        forward(config, weights(config), tokens, seen, routes=routes, how=Execution(attention=name))
        for name in ("plain", "splash")
    )
    np.testing.assert_array_equal(fused.routing.choices, routes)
    for got, expected in (fused.hidden, plain.hidden), (fused.routing.logits[0], plain.routing.logits[0]):
        close(got[seen], expected[seen], 2e-6)


def test_impossible_ids_in_padding_change_nothing():
    """-100 is what other libraries fill with; an id beyond the vocabulary would be NaN in some ways of looking up."""
    seen, tokens = SEEN["both"], TOKENS[:, :T]
    expected = np.asarray(apply(QWEN, weights(QWEN), tokens, seen)[0])
    for rubbish in (-100, 10**9):
        got = apply(QWEN, weights(QWEN), np.where(seen, tokens, rubbish).astype(np.int32), seen)[0]
        np.testing.assert_array_equal(np.asarray(got)[seen], expected[seen])
