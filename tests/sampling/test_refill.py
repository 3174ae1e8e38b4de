"""Continuous batching: the samples are those of the plain loop, whatever the slots, in fewer steps."""

import jax
import numpy as np
import pytest

from pt_jax.models import Config, bind, init
from pt_jax.sampling import Sampling, refill, sample, sample_queue

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


def ask(by, params=PARAMS, apply=MODEL.apply, init_cache=MODEL.init_cache, **more):
    more = SETTINGS | more
    return jax.tree.map(
        np.asarray, by(params, PROMPTS, SEEN, jax.random.key(5), apply=apply, init_cache=init_cache, **more)
    )


def assert_same(got, expected):
    for name in ("tokens", "alive", "ended"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(got.logps, expected.logps, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def plain():
    out = ask(sample, group=2)
    assert len(set(out.alive.sum(1))) > 5 and 0 < out.ended.sum() < 2 * P  # lengths that differ, some cut off
    return out


@pytest.mark.parametrize(("slots", "together"), [(2, 1), (5, 2), (6, None), (22, 11), (40, 3)])
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


@pytest.mark.parametrize(("slots", "more"), [(3, {}), (5, {"windows": (0, 4)})], ids=["all", "windows"])
def test_a_ring_that_grows_and_a_few_slots_that_go_on_alone_change_nothing(monkeypatch, slots, more):
    """Through four widths, the first of which has been turned over before it is left; with a limit and a temperature
    a row."""
    monkeypatch.setattr(refill, "rooms_of", lambda read, columns, chunk: [read + 4, read + 9, read + 14, columns])
    config = Config(vocab=29, layers=2, width=16, heads=4, kv_heads=2, head_width=4, hidden=32, eps=1e-3, **more)
    temperatures = np.linspace(0, 1.5, 2 * P, dtype=np.float32)
    rows = {"limits": np.array([3] * 18 + [17, N, N, 5]), "how": Sampling(temperatures), "end_tokens": (-1,)}
    model = {"params": weights(config), "apply": bind(config).apply, "init_cache": bind(config).init_cache}
    expected = ask(sample, group=2, **rows, **model)
    assert (expected.alive.sum(1) == rows["limits"]).all()
    assert_same(ask(sample_queue, group=2, slots=slots, **rows, **model), expected)
    jax.clear_caches()


def test_the_ring_is_as_wide_as_its_texts_and_the_last_are_few():
    """What is attended to at each step: [rows, columns]."""
    seen = []

    def apply(params, tokens, shown, cache):
        if tokens.shape[1] == 1:
            jax.debug.callback(lambda: seen.append((len(tokens), cache["v"].shape[3])))
        return MODEL.apply(params, tokens, shown, cache)

    limits = np.where(np.arange(P) == P - 1, 200, 4)  # one text is long, and it is the last
    out = ask(sample_queue, slots=4, length=200, end_tokens=(-1,), limits=limits, apply=apply)
    jax.effects_barrier()
    assert out.alive.sum(1).tolist() == limits.tolist()
    assert set(seen) == {(4, 70), (1, 206)} and seen == sorted(seen, reverse=True)
    assert sum(rows == 4 for rows, _ in seen) <= 4 * 6


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
    assert sum(shape[1] == T - 1 for shape in rows) == P  # one prompt is read at a time here, and each once


def test_other_numbers_are_not_another_program():
    traces = []

    def apply(params, tokens, seen, cache):
        traces.append(tokens.shape)
        return MODEL.apply(params, tokens, seen, cache)

    ask(sample_queue, slots=4, apply=apply, how=Sampling(0.5))
    count = len(traces)
    ask(sample_queue, slots=4, apply=apply, how=Sampling(1.5), end_tokens=(1, 2, 3, 4), pad_token=0)
    assert len(traces) == count


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"slots": 1, "group": 2}, "slots=1 cannot hold the 2 completions"),
        ({"slots": 4, "group": 2, "together": 3}, "together=3 prompts of 2 completions do not fit 4 slots"),
        ({"slots": 0}, "slots must be above 0"),
    ],
)
def test_bad_input_is_a_sentence(more, message):
    with pytest.raises(ValueError, match=message):
        ask(sample_queue, **more)
