"""What a cache may forget, round and share: rings of a window's length, int8, and prompts that stand there once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from small_models import jit

from pt_jax.models import Config, Execution, apply, attention, bind, decoder, init_cache, runs
from pt_jax.models.cache import SLACK, append, begin, forget, stacks

SIZES = {"vocab": 29, "width": 16, "heads": 4, "kv_heads": 2, "head_width": 8, "hidden": 24, "eps": 1e-2, "tied": False}
KINDS = {
    "all alike": Config(**SIZES, layers=2, windows=(5, 5), attention_softcap=2.0),
    "in turns, two windows, two ropes": Config(
        **SIZES, layers=7, windows=(3, 6, 0) * 2 + (3,), local_rope_base=30.0, scale_by_layer=True
    ),
    "experts": Config(
        **SIZES, layers=4, windows=(4, 0, 4, 0), experts=4, expert_hidden=6, expert_layers=(False, True, True, True)
    ),
    "no window": Config(**SIZES, layers=2),
}
INT8 = ["in turns, two windows, two ropes", "no window"]
T, LENGTHS = 60, (60, 33, 7)
SEEN = np.arange(T) >= T - np.array(LENGTHS)[:, None]
TOKENS = np.random.default_rng(2).integers(0, 29, (3, T)).astype(np.int32)
weights = functools.partial(small_models.weights, scale=0.3)
of = jit(apply, static_argnums=0)


@functools.cache
def whole(config):
    return np.asarray(of(config, weights(config), TOKENS, SEEN)[0])


def in_parts(config, cache, sizes, rows=slice(None), tokens=TOKENS, seen=SEEN):
    """The logits of texts that are read some tokens at a time, and the cache at their end."""
    logits = []
    for part in np.split(np.arange(tokens.shape[1]), np.cumsum(sizes)[:-1]):
        out, cache = of(config, weights(config), tokens[rows, part[0] : part[-1] + 1], seen[rows][:, part], cache)
        logits.append(np.asarray(out))
    return np.concatenate(logits, 1), cache


def close(got, expected, atol=1e-5):
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol * np.abs(expected).max())


# ---- rings


@pytest.mark.parametrize("sizes", [(30, *(1,) * 30), (20, 4, 4, 4, 20, 4, 4)], ids=["one by one", "several at a time"])
@pytest.mark.parametrize("kind", list(KINDS)[:3])
def test_a_ring_shows_what_a_whole_cache_shows(kind, sizes):
    """Of texts ten windows long, whose rows begin at different columns; and parts that are longer than the ring."""
    config = KINDS[kind]
    cache = init_cache(config, 3, T, slack=2)
    assert cache["near"]["k"].shape[-1] == max(config.windows) + 2
    got, cache = in_parts(config, cache, sizes)
    close(got[SEEN], whole(config)[SEEN])


@pytest.mark.parametrize("kind", list(KINDS)[:3])
def test_a_prompt_that_fills_its_cache_is_gone_on_from_in_a_larger_one(kind):
    """As the sampler reads prompts; the ring begins to turn in the prompt, at a column that is not 0."""
    config, n = KINDS[kind], 31
    got, small = in_parts(config, init_cache(config, 3, n, slack=0), (n,), tokens=TOKENS[:, :n], seen=SEEN[:, :n])
    close(got[SEEN[:, :n]], whole(config)[:, :n][SEEN[:, :n]])
    larger = init_cache(config, 3, T, slack=0)
    put = lambda x, y: y.at[tuple(map(slice, x.shape))].set(x)
    cache = jax.tree.map(put, small, larger) | {"room": larger["room"]}
    got, _ = in_parts(config, cache, (1,) * (T - n), tokens=TOKENS[:, n:], seen=SEEN[:, n:])
    close(got[SEEN[:, n:]], whole(config)[:, n:][SEEN[:, n:]])


def test_a_ring_takes_the_memory_of_its_window():
    size = lambda config, length, **more: sum(
        x.size * x.dtype.itemsize
        for x in jax.tree.leaves(jax.eval_shape(lambda: init_cache(config, 8, length, **more)))
    )
    one = 8 * 2 * 2 * 8 * 4  # rows, keys and values, heads, width, float32
    about = 8 * 4  # and its position
    alone = dataclasses.replace(KINDS["all alike"], windows=(500, 500))
    for length in (100, 400, 4000):
        expected = 2 * one * min(length, 516) + about * (length + min(length, 516)) + 8 * 4 + 4
        assert size(alone, length) == expected
    assert size(alone, 4000, slack=0) == size(alone, 4000) - SLACK * (2 * one + about)
    mixed = dataclasses.replace(alone, layers=6, windows=(500, 500, 0) * 2)
    assert size(mixed, 4000) - size(mixed, 3000) == 1000 * (2 * one + about)
    full = dataclasses.replace(mixed, windows=())
    assert size(mixed, 4000) < 0.43 * size(full, 4000)


def test_what_a_ring_has_lost_is_not_made_up():
    """Between a row's tokens there is padding: its window is longer than the ring, and there is no number."""
    config = KINDS["all alike"]
    seen = SEEN.copy()
    seen[1, 40:48] = False
    expected = np.asarray(of(config, weights(config), TOKENS, seen)[0])
    got, _ = in_parts(config, init_cache(config, 3, T, slack=2), (30, *(1,) * 30), seen=seen)
    lost = np.isnan(got).any(-1)
    assert lost[1, 48] and not lost[[0, 2]].any() and not lost[:, :48].any()
    close(got[seen & ~lost], expected[seen & ~lost])
    kept, _ = in_parts(config, init_cache(config, 3, T, slack=10), (30, *(1,) * 30), seen=seen)
    close(kept[seen], expected[seen])


@pytest.mark.parametrize("kind", list(KINDS)[:2])
def test_a_ring_forgets_what_it_has_slack_for_and_says_when_it_has_not(kind):
    config = KINDS[kind]
    cache = in_parts(config, init_cache(config, 3, T, slack=4), (30,), tokens=TOKENS[:, :30], seen=SEEN[:, :30])[1]
    for several in ((4,), (1,) * 4):
        wrong = (TOKENS[:, 30:34] + 1) % 29
        other = forget(in_parts(config, cache, several, tokens=wrong, seen=np.ones((3, 4), bool))[1], 4)
        got, _ = in_parts(config, other, (4, 1, 1), tokens=TOKENS[:, 30:36], seen=SEEN[:, 30:36])
        close(got[SEEN[:, 30:36]], whole(config)[:, 30:36][SEEN[:, 30:36]])
    wrong = (TOKENS[:, 30:36] + 1) % 29
    other = forget(in_parts(config, cache, (6,), tokens=wrong, seen=np.ones((3, 6), bool))[1], 6)
    got, _ = in_parts(config, other, (1,), tokens=TOKENS[:, 30:31], seen=SEEN[:, 30:31])
    assert np.isnan(got[0]).all()


def test_layers_of_two_kinds_that_take_turns_are_one_loop():
    """So that compile time does not grow with depth."""
    sizes = lambda windows, **more: [
        (turns.times, [len(layers.index[0]) for _, layers in turns.runs])
        for turns in runs.in_cache(Config(**SIZES, layers=len(windows), windows=windows, **more))
    ]
    assert sizes((0,) * 9) == sizes((7,) * 9) == [(1, [9])]
    assert sizes((4, 0) * 13) == [(13, [1, 1])]
    assert sizes((4, 4, 4, 4, 4, 0) * 4 + (4, 4)) == [(4, [5, 1]), (1, [2])]
    assert sizes((0,) * 5 + (3,) * 4) == [(1, [5]), (1, [4])]
    assert sizes((0, 3, 3)) == [(1, [1]), (1, [2])]
    experts = {"experts": 2, "expert_hidden": 4, "expert_layers": (False, *(True,) * 7)}
    assert sizes((4, 0) * 4, **experts) == [(1, [1]), (3, [1, 1]), (1, [1])]


# ---- int8


def rounded_whole(config, monkeypatch):
    """The logits of whole rows, without a cache, of a model whose keys and values are rounded where they are made."""

    def rounded(x):
        scale = jnp.abs(x).max(-1, keepdims=True) / 127
        return scale * jnp.round(x / scale)

    made = decoder._qkv
    monkeypatch.setattr(decoder, "_qkv", lambda *args: (lambda q, k, v: (q, rounded(k), rounded(v)))(*made(*args)))
    return np.asarray(jit(functools.partial(apply, config))(weights(config), TOKENS, SEEN)[0])


def near(got, expected):
    """Where a number lies between two parts, rounding errors decide which it becomes: single tokens differ by more."""
    error = np.abs(got - expected).max(-1) / np.abs(expected).max()
    assert np.median(error) < 1e-6 and error.mean() < 3e-4 and error.max() < 0.02, (np.median(error), error.max())


@pytest.mark.parametrize("kind", INT8)
def test_an_int8_cache_is_rounded_once_however_a_text_is_cut(kind, monkeypatch):
    """And what is read together sees each other rounded, too: prompts, and guesses that are checked."""
    config = KINDS[kind]
    expected = rounded_whole(config, monkeypatch)
    monkeypatch.undo()
    for sizes in ((30, *(1,) * 30), (20, 4, 4, 4, 20, 4, 4)):
        got, _ = in_parts(config, init_cache(config, 3, T, jnp.int8, slack=2), sizes)
        near(got[SEEN], expected[SEEN])
    # a number is off by half a part of 127 at most; so much is left of it here, after two and seven layers
    error = np.abs(got - whole(config))[SEEN] / np.abs(whole(config)).max()
    assert 1e-4 < error.max() < 0.05 and error.mean() < 0.003, (error.max(), error.mean())


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1.0, 1e4])
def test_every_number_is_rounded_to_half_a_part_of_its_heads_largest(scale):
    config, rng = KINDS["no window"], np.random.default_rng(0)
    k, v = jnp.float32(scale * rng.normal(size=(2, 3, 5, 2, 8)))
    cache = init_cache(config, 3, 9, jnp.int8)
    begun, _ = begin(config, cache, np.ones((3, 5), bool))
    stack, (part,) = append(stacks(cache)["far"], 1, k, v, begun.places["far"])
    for x, name, axes, scales in ((k, "k", (0, 3, 1, 2), 2), (v, "v", (0, 2, 1, 3), 3)):
        got = part[name].astype(np.float32) * np.expand_dims(part[f"{name}_scale"], scales)
        got = np.transpose(got, axes)[:, :5]
        largest = np.abs(x).max(-1, keepdims=True)
        assert (np.abs(got - x) <= largest / 254 * (1 + 1e-5)).all()
        np.testing.assert_array_equal(part[name], stack[name][1])
        assert part[name].dtype == np.int8


def test_an_int8_cache_takes_a_quarter_of_the_memory_and_its_scales():
    size = lambda dtype: sum(
        x.size * x.dtype.itemsize
        for stack in stacks(jax.eval_shape(lambda: init_cache(KINDS["all alike"], 8, 100, dtype))).values()
        for x in jax.tree.leaves(stack)
    )
    assert size(jnp.bfloat16) == size(jnp.float16) == size(jnp.float32) / 2
    assert size(jnp.int8) == size(jnp.float32) * (8 + 4) / 32  # heads of 8 numbers, and 4 bytes


def test_the_type_of_the_cache_is_part_of_how_a_model_is_computed():
    config = KINDS["no window"]
    for how, dtype in [
        (Execution(), "float32"), (Execution(dtype="bfloat16"), "bfloat16"), (Execution(cache_dtype="int8"), "int8"),
        (Execution(dtype="bfloat16", cache_dtype="float16"), "float16"),
    ]:  # fmt: skip
        assert bind(config, how).init_cache(1, 2)["k"].dtype == dtype
    with pytest.raises(
        ValueError, match=r"^there is no cache of type int16; known are float32, bfloat16, float16, int8$"
    ):
        init_cache(config, 1, 2, jnp.int16)
    with pytest.raises(ValueError, match=r"^cache_dtype is 'int4'; known are None, 'float32', .*'int8'$"):
        Execution(cache_dtype="int4")


# ---- a prefix


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, jnp.float32) for kind in KINDS), (INT8[0], jnp.int8)])
def test_rows_behind_a_shared_prefix_have_the_logits_of_whole_rows(kind, dtype):
    """Two rows a prompt, of prompts that are longer than every window or of one token; some tokens together, too."""
    config, n = KINDS[kind], 30
    # the third prompt has nothing but padding, and its last token comes with the answers
    _, prefix = in_parts(config, init_cache(config, 3, n, dtype, slack=0), (n,), tokens=TOKENS[:, :n], seen=SEEN[:, :n])
    rng = np.random.default_rng(1)
    answers, said = rng.integers(0, 29, (6, T - n)).astype(np.int32), np.arange(T - n) < rng.integers(9, 31, (6, 1))
    tokens = np.concatenate([np.repeat(TOKENS[:, :n], 2, 0), answers], 1)
    seen = np.concatenate([np.repeat(SEEN[:, :n], 2, 0), said], 1)
    cache = init_cache(config, 6, T - n, dtype, slack=2) | {"prefix": prefix}
    got, after = in_parts(config, cache, (4, 4, 4, *(1,) * 18), tokens=answers, seen=said)
    if dtype is jnp.int8:
        expected, _ = in_parts(config, init_cache(config, 6, T, dtype), (T,), tokens=tokens, seen=seen)
        near(got[said], expected[:, n:][said])
    else:
        expected = np.asarray(of(config, weights(config), tokens, seen)[0])
        close(got[said], expected[:, n:][said])
    assert after["prefix"] is not None and after["position"].shape == (6, T - n)
    np.testing.assert_array_equal(after["position"], np.where(said, seen.cumsum(1)[:, n:] - 1, -1))


def test_a_prefix_that_cannot_be_is_a_sentence():
    config = KINDS["no window"]
    cache, prefix = init_cache(config, 6, 4), init_cache(config, 4, 4)
    ask = lambda cache: apply(config, weights(config), np.zeros((6, 1), np.int32), np.ones((6, 1), bool), cache)
    with pytest.raises(ValueError, match="6 rows cannot go on from a prefix of 4"):
        ask(cache | {"prefix": prefix})
    with pytest.raises(ValueError, match="the prefix of the cache has a prefix itself"):
        ask(cache | {"prefix": init_cache(config, 3, 4) | {"prefix": prefix}})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_cudnn_is_handed_all_parts_as_one(dtype, monkeypatch):
    """Its kernel runs on NVIDIA's GPUs alone; what it is handed is computed by the program that is its equal."""
    of_xla = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **k: of_xla(*a, **k | {"implementation": "xla"}))
    rng = np.random.default_rng(0)
    heads = lambda rows, tokens, count: jnp.float32(rng.normal(size=(rows, tokens, count, 8)))
    parts, visible = [], []
    for rows, tokens in ((2, 7), (6, 3)):
        cache = init_cache(KINDS["no window"], rows, tokens, dtype)
        begun, _ = begin(KINDS["no window"], cache, np.ones((rows, tokens), bool))
        new = heads(rows, tokens, 2), heads(rows, tokens, 2)
        parts += append(stacks(cache)["far"], 0, *new, begun.places["far"])[1]
        visible.append(jnp.asarray(rng.random((6, 1, 2, tokens)) < 0.6).at[..., 0].set(True))
    q = heads(6, 2, 4)
    got, expected = (attention.of_cache(name, visible, scale=0.4)(q, parts) for name in ("cudnn", "plain"))
    assert got.shape == q.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_tokens_that_do_not_fit_behind_those_before_are_refused():
    config, cache = KINDS["no window"], init_cache(KINDS["no window"], 1, 8)
    cache = begin(config, cache, np.ones((1, 6), bool))[1]
    with pytest.raises(ValueError, match="4 tokens do not fit behind the 6 in a cache for 8; give init_cache more"):
        begin(config, cache, np.ones((1, 4), bool))
