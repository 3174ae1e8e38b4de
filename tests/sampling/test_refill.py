"""Continuous batching: the samples are those of the plain loop, whatever the slots, in fewer steps."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax.models import Config, bind, init, init_cache
from pt_jax.sampling import Sampling, decode, lanes, refill, rings, sample, sample_queue

CONFIG = Config(vocab=29, layers=2, width=16, heads=4, kv_heads=2, head_width=4, hidden=32, eps=1e-3, tied=False)


def weights(config):
    return jax.tree.map(lambda x: x * 12 if x.ndim > 2 or x.shape[0] == 29 else x, init(config, jax.random.key(0)))


MODEL, PARAMS = bind(CONFIG), weights(CONFIG)
N = 24
RNG = np.random.default_rng(1)
P, T = 11, 7
PROMPTS = RNG.integers(0, 29, (P, T)).astype(np.int32)
SEEN = np.arange(T) >= RNG.integers(0, T, (P, 1))
ENDS = (3, 8, 15, 21)
SETTINGS = {"length": N, "end_tokens": ENDS, "pad_token": 3, "how": Sampling(0.9, top_p=0.95)}
# Tiny programs compile longer than they run: half as long like this.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def ask(by, params=PARAMS, apply=MODEL.apply, init_cache=MODEL.init_cache, jit=jit, **more):
    """What ``more`` has of arrays are arguments of the program, so that other ones do not make it another."""
    more = {"apply": apply, "init_cache": init_cache} | SETTINGS | more
    arrays = {name: x for name, x in more.items() if isinstance(x, np.ndarray)}
    run = jit(lambda params, prompts, seen, arrays: by(params, prompts, seen, jax.random.key(5), **more | arrays))
    return jax.tree.map(np.asarray, run(params, PROMPTS, SEEN, arrays))


def assert_same(got, expected):
    for name in ("tokens", "alive", "ended"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(got.logps, expected.logps, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def plain():
    out = ask(sample, group=2)
    assert len(set(out.alive.sum(1))) > 5 and 0 < out.ended.sum() < 2 * P  # lengths that differ, some cut off
    return out


@pytest.mark.parametrize(("slots", "together"), [(1, 1), (5, 2), (6, None), (22, 11), (40, 3)])
def test_the_samples_are_those_of_the_plain_loop(plain, slots, together):
    assert_same(ask(sample_queue, group=2, slots=slots, together=together), plain)


def test_prompts_are_addressed_by_their_ids(plain):
    ids = np.arange(P)[::-1].copy()
    assert_same(ask(sample_queue, slots=3, prompt_ids=ids), ask(sample, prompt_ids=ids))


@pytest.mark.parametrize(
    "more", [{"windows": (3, 3)}, {"windows": (0, 4)}, {"learned_positions": True, "norm": "layer", "qk_norm": False}]
)
def test_rings_are_read_by_positions(more):
    """Where a window or a learned position looks at how far back a token is, its column says something else."""
    config = Config(vocab=29, layers=2, width=16, heads=4, kv_heads=2, head_width=4, hidden=32, **more)
    model = {"params": weights(config), "apply": bind(config).apply, "init_cache": bind(config).init_cache}
    assert_same(ask(sample_queue, slots=3, **model), ask(sample, **model))


def test_a_ring_of_one_column_is_a_ring():
    """It has that column for one token and for two; it was taken for an array that is not moved."""
    config = Config(vocab=29, layers=2, width=16, heads=4, kv_heads=2, head_width=4, hidden=32, windows=(0, 1))
    rows, columns = rings.axes(functools.partial(init_cache, config, slack=0))
    assert columns["near"] == {"k": 4, "v": 3, "position": 1, "slack": -1}
    assert columns["position"] == 1 and columns["count"] == columns["room"] == -1 and rows["near"]["k"] == 1


@pytest.mark.parametrize("more", [{}, {"windows": (0, 4)}], ids=["all", "windows"])
def test_lanes_and_a_few_slots_that_go_on_alone_change_nothing(monkeypatch, more):
    """Through four lanes of 8, 4, 2 and 2 slots, the first of which has been turned over before it is left; with a
    limit and a temperature a row."""
    monkeypatch.setattr(lanes, "rooms_of", lambda read, columns: [read + 4, read + 9, read + 14, columns])
    monkeypatch.setattr(refill, "FEW", 2)
    config = Config(vocab=29, layers=2, width=16, heads=4, kv_heads=2, head_width=4, hidden=32, eps=1e-3, **more)
    temperatures = np.linspace(0, 1.5, 2 * P, dtype=np.float32)
    rows = {"limits": np.array([3] * 10 + [N, 9, 14] + [3] * 5 + [17, N, N, 5]), "end_tokens": (-1,)}
    rows["how"] = Sampling(temperatures)
    model = {"params": weights(config), "apply": bind(config).apply, "init_cache": bind(config).init_cache}
    expected = ask(sample, group=2, **rows, **model)
    assert (expected.alive.sum(1) == rows["limits"]).all()
    assert_same(ask(sample_queue, group=2, slots=8, **rows, **model), expected)


def test_a_text_that_outgrows_a_ring_waits_until_the_next_has_room(monkeypatch):
    """All outgrow the first lane, of 8 slots, and the second, of 4; the last has 2."""
    monkeypatch.setattr(lanes, "rooms_of", lambda read, columns: [read + 4, read + 8, columns])
    rows = {"end_tokens": (-1,), "limits": np.where(np.arange(3 * P) == 7, 2, N)}
    assert_same(ask(sample_queue, group=3, slots=8, **rows), ask(sample, group=3, **rows))


def test_a_ring_is_as_wide_as_its_texts_and_the_last_are_few():
    """What is attended to at each step: [rows, columns]."""
    seen = []

    def apply(params, tokens, shown, cache):
        if tokens.shape[1] == 1:
            jax.debug.callback(lambda: seen.append((len(tokens), cache["v"].shape[3])))
        return MODEL.apply(params, tokens, shown, cache)

    limits = np.full(P, 4)
    limits[[3, -1]] = 100, 200
    out = ask(sample_queue, slots=8, length=200, end_tokens=(-1,), limits=limits, apply=apply)
    jax.effects_barrier()
    assert out.alive.sum(1).tolist() == limits.tolist()
    widths = [next(group) for _, group in itertools.groupby(seen)]
    assert widths == [(8, 70), (4, 206), (1, 206)]
    assert 64 <= seen.count((8, 70)) <= 76 and 100 <= seen.count((1, 206)) < 105


def test_slots_are_filled_again_and_so_less_is_computed(plain):
    rows = []

    def apply(params, tokens, seen, cache):
        jax.debug.callback(lambda: rows.append(tokens.shape))
        return MODEL.apply(params, tokens, seen, cache)

    out = ask(sample_queue, group=2, slots=6, apply=apply)
    jax.effects_barrier()
    steps = sum(shape[1] == 1 for shape in rows)
    lengths = out.alive.sum(1)
    assert (lengths.sum() - 2 * P) / 6 <= steps  # no token for nothing
    one_after_another = sum(lengths[i : i + 6].max() for i in range(0, 2 * P, 6))
    assert steps < 0.9 * one_after_another


@pytest.mark.parametrize(("together", "shape"), [(1, (1, T - 1)), (5, (4, T - 1)), (99, (P, T - 1))])
def test_each_prompt_is_read_once_for_all_of_its_completions(together, shape):
    """And so many together that few are read in vain: of 11, three times 4, where 5 are allowed."""
    read = []

    def apply(params, tokens, seen, cache):
        if tokens.shape[1] > 1:
            jax.debug.callback(lambda tokens: read.append(np.asarray(tokens)), tokens)
        return MODEL.apply(params, tokens, seen, cache)

    ask(sample_queue, group=3, slots=4, together=together, length=4, apply=apply)
    jax.effects_barrier()
    assert {x.shape for x in read} == {shape} and len(read) == -(-P // shape[0])
    np.testing.assert_array_equal(np.concatenate(read)[:P], PROMPTS[:, :-1])


def test_long_prompts_are_read_in_pieces(plain, monkeypatch):
    """Of 6 columns a rest of 2, and 4."""
    monkeypatch.setattr(decode, "PIECE", 4)
    assert_same(ask(sample_queue, group=2, slots=5, apply=lambda *given: MODEL.apply(*given)), plain)  # not yet traced


def test_memory_is_that_of_the_slots_however_many_prompts_there_are():
    """A fourth more for the pool, and as much again while the ring grows; what is drawn is small beside it."""
    config = Config(vocab=8, layers=16, width=8, heads=1, kv_heads=1, head_width=16, hidden=8)
    model, params = bind(config), jax.eval_shape(lambda: init(config, jax.random.key(0)))
    slots, read, length = 4, 63, 64
    of_rows = lambda rows, columns: rows * columns * 16 * 2 * 16 * 4  # layers, keys and values, width, float32

    def memory(prompts):
        ask = lambda params, prompts, seen: sample_queue(
            params, prompts, seen, jax.random.key(0), apply=model.apply, init_cache=model.init_cache, length=length,
            end_tokens=(-1,), pad_token=0, group=8, slots=slots,
        )  # fmt: skip
        rows = (jax.ShapeDtypeStruct((prompts, read + 1), x) for x in (jnp.int32, bool))
        return jax.jit(ask).lower(params, *rows).compile().memory_analysis().temp_size_in_bytes

    few, many = memory(8), memory(64)
    assert many < 3 * of_rows(slots, read + length) + of_rows(1, read), many / of_rows(slots, read + length)
    assert many - few < 0.1 * of_rows(56, read), (many - few) / of_rows(56, read)


# ---- replay, and what is kept


def test_a_replay_has_the_same_bits_and_half_a_replay_goes_on_alike():
    config = Config(vocab=29, layers=2, width=16, heads=4, kv_heads=2, head_width=4, hidden=32, windows=(0, 4))
    model = {"params": weights(config), "apply": bind(config).apply, "init_cache": bind(config).init_cache}
    draw = functools.partial(ask, sample_queue, group=2, slots=5, entropies=True, **model)
    first = draw(forced=np.full((2 * P, N), -1))
    again = draw(forced=first.tokens)
    for name in ("tokens", "logps", "alive", "ended", "entropies"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name), err_msg=name)
    half = np.where(np.arange(N) % 2, (first.tokens + 1) % 29, np.int32(-1))
    half[::3] = -1
    got = draw(forced=half)
    assert_same(got, ask(sample, group=2, forced=half, **model))
    assert not np.array_equal(got.tokens, first.tokens)
    np.testing.assert_array_equal(got.tokens[::3], first.tokens[::3])


def test_what_is_kept_is_what_the_loop_keeps(monkeypatch):
    """Through three lanes, the first of which has been turned over; of every token that was read."""
    monkeypatch.setattr(lanes, "rooms_of", lambda read, columns: [read + 4, read + 13, columns])
    config = Config(
        vocab=29, layers=2, width=16, heads=4, kv_heads=2, head_width=4, hidden=32, eps=1e-3, experts=4,
        expert_hidden=8, windows=(0, 4),
    )  # fmt: skip
    model = {"params": weights(config), "apply": bind(config).apply, "init_cache": bind(config).init_cache}
    keep = {"group": 2, "keep": ("routes", "position", "v"), "limits": np.array([3] * 18 + [17, N, N, 5])}
    got, expected = ask(sample_queue, slots=5, **keep, **model), ask(sample, shared_prefix=False, **keep, **model)
    assert_same(got, expected)
    read = np.concatenate([np.repeat(SEEN, 2, 0), np.pad(expected.alive[:, 1:], ((0, 0), (0, 1)))], 1)
    for name, axes in {"routes": (1, 2), "position": (0, 1), "v": (1, 3)}.items():
        assert got.kept[name].shape == expected.kept[name].shape and got.kept[name].dtype == expected.kept[name].dtype
        a, b = (np.moveaxis(x.kept[name], axes, (0, 1))[read] for x in (got, expected))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5, err_msg=name)
    assert len(set(got.kept["routes"].ravel().tolist())) == 4


def test_other_numbers_are_not_another_program():
    traces = []

    def apply(params, tokens, seen, cache):
        traces.append(tokens.shape)
        return MODEL.apply(params, tokens, seen, cache)

    ask(sample_queue, slots=4, apply=apply, how=Sampling(0.5), jit=lambda f: f)
    count = len(traces)
    more = {"end_tokens": (1, 2, 3, 4), "pad_token": 0, "forced": np.full((P, N), -1)}
    ask(sample_queue, slots=4, apply=apply, how=Sampling(1.5), jit=lambda f: f, **more)
    assert len(traces) == count


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"slots": 0}, "slots must be above 0"),
        ({"slots": 2, "together": 0}, "together must be above 0"),
        ({"slots": 2, "until": len}, "until looks at tokens between two programs, and a queue is one; give it to"),
        ({"slots": 2, "prompt_ids": np.arange(2)}, r"prompt_ids has shape \(2,\), expected \[P\] with P=11"),
        ({"slots": 2, "forced": np.zeros((P, N - 1), int)}, r"forced has shape \(11, 23\), expected \[11, 24\]"),
        ({"slots": 2, "forced": np.full((P, N), 29)}, "forced has the id 29, but the model knows 29 tokens"),
        ({"slots": 2, "keep": ("near",)}, "keep names 'near', which is no array of the cache; those are count, end"),
        ({"slots": 2, "keep": ("count",)}, "keep names 'count', which has no slot for each token of each row"),
        ({"slots": 2, "keep": ("room",)}, "keep names 'room', which is no array of the cache"),
    ],
)
def test_bad_input_is_a_sentence(more, message):
    with pytest.raises(ValueError, match=message):
        ask(sample_queue, jit=lambda f: f, **more)
