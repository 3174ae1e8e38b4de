"""What comes with the tokens: the likeliest others, and how long it took; and how often the host is asked."""

import functools

import jax
import numpy as np
import pytest

from pt_jax.models import Config, bind, init
from pt_jax.sampling import (
    Completions,
    Sampling,
    sample,
    sample_queue,
    sample_until,
    stream,
    streaming,
    timed,
    timings,
    transform,
)

V, N, K = 29, 20, 4
CONFIG = Config(vocab=V, layers=1, width=16, heads=2, kv_heads=1, head_width=8, hidden=16, eps=1e-3, qk_norm=False)
MODEL = bind(CONFIG)
PARAMS = jax.tree.map(lambda x: x * 12 if x.ndim > 2 or x.shape[0] == V else x, init(CONFIG, jax.random.key(0)))
PROMPTS = np.array([[1, 1, 5, 6, 7], [1, 1, 1, 1, 4], [9, 0, 0, 11, 2]], np.int32)
SEEN = np.array([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]], bool)
HOW = Sampling(0.6, top_p=0.7)
SETTINGS = {
    "apply": MODEL.apply, "init_cache": MODEL.init_cache, "length": N, "end_tokens": (11, 6),
    "pad_token": 3, "how": HOW,
}  # fmt: skip
ASKED = {"alternatives": K, "entropies": True}


def ask(by, **more):
    out = by(PARAMS, PROMPTS, SEEN, jax.random.key(3), **SETTINGS | {"group": 2} | more)
    return out if by is stream else jax.tree.map(np.asarray, out)


@pytest.fixture(scope="module")
def plain():
    out = ask(sample, keep=("position",), **ASKED)
    assert len(set(out.alive.sum(1))) > 2 and out.ended.any()
    return out


def test_alternatives_are_the_likeliest_of_what_was_drawn_from(plain):
    """Against a sort of the teacher's distribution; with fewer possible tokens than are asked for in some places."""
    tokens = np.concatenate([np.repeat(PROMPTS, 2, 0), plain.tokens], 1)
    seen = np.concatenate([np.repeat(SEEN, 2, 0), plain.alive], 1)
    logits = transform(jax.jit(MODEL.apply)(PARAMS, tokens, seen)[0][:, PROMPTS.shape[1] - 1 : -1], HOW)
    logps = np.asarray(jax.nn.log_softmax(logits), np.float64)
    expected = -np.sort(-logps, -1)[..., :K]
    alive = plain.alive
    assert plain.alternatives.shape == plain.alternative_logps.shape == (6, N, K)
    assert 0.05 < np.isneginf(expected[alive]).mean() < 0.95
    np.testing.assert_allclose(plain.alternative_logps[alive], expected[alive], rtol=0, atol=1e-5)
    of_ids = np.take_along_axis(logps, plain.alternatives, -1)
    np.testing.assert_allclose(of_ids[alive], expected[alive], rtol=0, atol=1e-5)
    assert all(len(set(row)) == K for row in plain.alternatives[alive].tolist())
    assert (plain.alternative_logps[~alive] == 0).all() and (plain.alternatives[~alive] == 0).all()
    among = plain.alternatives == plain.tokens[..., None]
    np.testing.assert_array_equal(plain.alternative_logps[among & alive[..., None]], plain.logps[among.any(-1) & alive])


def test_what_is_not_asked_for_is_none():
    out = ask(sample)
    assert out.alternatives is None and out.alternative_logps is None and out.entropies is None and out.timings is None


@pytest.mark.parametrize(
    "by", [functools.partial(sample_queue, slots=4), functools.partial(sample_until, chunk=7)], ids=["queue", "until"]
)
def test_other_engines_say_the_same_of_every_token(plain, by):
    out = ask(by, **ASKED)
    for name in ("tokens", "alive", "alternatives"):
        np.testing.assert_array_equal(getattr(out, name), getattr(plain, name), err_msg=name)
    for name in ("logps", "entropies", "alternative_logps"):
        np.testing.assert_allclose(getattr(out, name), getattr(plain, name), rtol=0, atol=1e-5, err_msg=name)


def test_a_stream_replays_and_keeps_as_the_program_does(plain):
    out = ask(sample_until, forced=plain.tokens, keep=("position",), chunk=7, until=lambda tokens, before: None)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    np.testing.assert_allclose(out.logps, plain.logps, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(out.kept["position"], plain.kept["position"])
    parts = list(ask(stream, keep=("position",)))
    assert [bool(x.kept) for x in parts] == [False] * (len(parts) - 1) + [True]


def test_what_is_taken_back_says_nothing(plain):
    out = ask(sample_until, until=lambda tokens, before: 3 if len(tokens) > 2 else None, **ASKED)
    np.testing.assert_array_equal(out.alive, plain.alive & (np.arange(N) < 3)[None])
    for name in ("logps", "entropies", "alternatives", "alternative_logps"):
        assert (getattr(out, name)[~out.alive] == 0).all(), name


# ---- the host


def test_a_stream_asks_the_device_once_a_piece(monkeypatch):
    fetched, real = [], jax.device_get
    monkeypatch.setattr(streaming.jax, "device_get", lambda x: fetched.append(1) or real(x))
    with jax.transfer_guard_device_to_host("disallow"):  # of what is not asked for in so many words
        parts = list(ask(stream, chunk=8, end_tokens=(-1, -2), limits=np.full(6, 17)))
    assert len(parts) == 3 and len(fetched) == len(parts)


@pytest.mark.parametrize("by", [sample, functools.partial(sample_queue, slots=4)], ids=["sample", "queue"])
def test_a_program_never_asks_the_host(by):
    """It can be traced whole, so no number is looked at on the way; and nothing in it calls back."""
    run = lambda params, key, limits: ask_traced(by, params, key, limits)
    text = jax.jit(run).lower(PARAMS, jax.random.key(0), np.full(6, 5)).as_text()
    assert "while" in text and not any(word in text for word in ("callback", "infeed", "outfeed", "host"))


def ask_traced(by, params, key, limits):
    return by(params, PROMPTS, SEEN, key, limits=limits, **SETTINGS | {"group": 2}).tokens


# ---- the time


class Clock:
    """A second at every look."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 1.0
        return self.now


def test_timings_tell_compiling_from_sampling(monkeypatch):
    monkeypatch.setattr(timings, "time", Clock())

    def sampler(tokens):
        jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 0.25)
        jax.monitoring.record_event_duration_secs("/jax/core/compile/jaxpr_to_mlir_module_duration", 0.25)
        jax.monitoring.record_event_duration_secs("/jax/something/else", 9.0)
        return Completions(tokens, np.zeros(tokens.shape), tokens > 0)

    out = timed(sampler, np.array([[1, 2, 0], [3, 0, 0]]))
    assert out.timings == timings.Timings(compiled=0.5, first=1.0, whole=1.0, tokens=3) and out.timings.rate == 6.0
    jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 5.0)
    assert timed(sampler, np.array([[1]])).timings.compiled == 0.5  # what others compile is not this call's


def test_what_comes_beside_completions_still_comes_when_it_is_timed(monkeypatch):
    """As the readings of ``speculate`` and the scores of ``beam_search``."""
    monkeypatch.setattr(timings, "time", Clock())
    out, reads = timed(lambda tokens: (Completions(tokens, tokens * 0.0, tokens > 0), "reads"), np.array([[1, 2, 0]]))
    assert reads == "reads" and out.timings == timings.Timings(compiled=0.0, first=1.0, whole=1.0, tokens=2)


def test_a_program_that_is_there_compiles_nothing():
    length = 7  # that no other test asks for
    first, second = (timed(sample, PARAMS, PROMPTS, SEEN, jax.random.key(i), **SETTINGS | {"length": length}).timings
                     for i in range(2))  # fmt: skip
    assert 0 < first.compiled < first.whole and second.compiled == 0 < second.first == second.whole


def test_a_stream_has_its_first_tokens_before_the_others():
    parts = list(ask(stream, chunk=4, end_tokens=(-1, -2)))
    first, last = parts[0].timings, parts[-1].timings
    assert first.first == first.whole == last.first < last.whole
    assert first.tokens == 6 * 4 and last.tokens == 6 * N
    whole = ask(sample_until, chunk=4, end_tokens=(-1, -2)).timings
    assert whole.tokens == 6 * N and whole.first < whole.whole and whole.compiled == 0


def test_what_is_done_with_a_piece_is_not_in_the_time(monkeypatch):
    """Neither its seconds nor what is compiled in them."""
    clock = Clock()
    monkeypatch.setattr(timings, "time", clock)
    taken = []
    for part in ask(stream, chunk=4, end_tokens=(-1, -2)):
        taken.append(part.timings)
        clock.now += 1000.0
        jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 7.0)
    count = len(taken)
    assert [x.whole for x in taken] == [1.0 + i for i in range(count)] and count == N // 4
    assert {x.first for x in taken} == {1.0} and taken[-1].compiled == taken[0].compiled < 7
