"""The loop around the model: it ends with its last row, grows its cache, replays what it said, and takes what is asked
a row at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax.models import Config, bind, init
from pt_jax.models.config import RopeScaling
from pt_jax.sampling import Sampling, decode, sample, sample_queue, sample_until, score, speculate, transform

CONFIG = Config(vocab=29, layers=2, width=16, heads=4, kv_heads=2, head_width=4, hidden=32, eps=1e-3, tied=False)
MODEL = bind(CONFIG)
PARAMS = jax.tree.map(lambda x: x * 12 if x.ndim > 2 or x.shape[0] == 29 else x, init(CONFIG, jax.random.key(0)))
N, G, NEVER = 40, 2, (-1,)
PROMPTS = np.array([[1, 1, 5, 6, 7], [1, 1, 1, 1, 4], [9, 0, 0, 11, 2]], np.int32)
SEEN = np.array([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]], bool)
ROWS = len(PROMPTS) * G


def completions(apply=MODEL.apply, init_cache=MODEL.init_cache, **more):
    more = {"length": N, "group": G, "end_tokens": NEVER, "pad_token": 0} | more
    out = sample(PARAMS, PROMPTS, SEEN, jax.random.key(3), apply=apply, init_cache=init_cache, **more)
    return jax.tree.map(np.asarray, out)


@pytest.fixture(scope="module")
def base():
    return completions()


def an_end(base, rows=slice(None), after=0):
    """A token that these rows all draw, after some others; else the commonest."""
    return int(np.bincount(base.tokens[rows, after:].ravel(), minlength=29).argmax())


# ---- the end


def steps_of(**more):
    """How often the model reads one token a row."""
    count = []

    def apply(params, tokens, seen, cache):
        if tokens.shape[1] == 1:
            jax.debug.callback(lambda: count.append(1))
        return MODEL.apply(params, tokens, seen, cache)

    completions(apply=apply, **more)
    jax.effects_barrier()
    return len(count)


def test_the_loop_ends_with_its_last_row(base):
    assert N <= steps_of() < N + decode.CHUNK
    assert 3 <= steps_of(limits=np.array([1, 2, 3, 1, 1, 2])) <= decode.CHUNK
    common = np.bincount(base.tokens.ravel(), minlength=29).argsort()[::-1][:12]
    ends = tuple(int(x) for x in common)
    longest = completions(end_tokens=ends).alive.sum(1).max()
    assert longest < N / 2
    assert longest <= steps_of(end_tokens=ends) < longest + decode.CHUNK


def test_a_row_says_whether_it_ended_or_was_cut_off(base):
    end = an_end(base)
    out = completions(end_tokens=(end,))
    np.testing.assert_array_equal(out.ended, (base.tokens == end).any(1))
    assert out.ended.any()
    short = completions(end_tokens=(end,), limits=np.full(ROWS, 2))
    np.testing.assert_array_equal(short.ended, (base.tokens[:, :2] == end).any(1))


def test_every_row_has_its_own_limit(base):
    limits = np.array([1, N, 17, 2, 33, 16])
    out = completions(limits=limits)
    inside = np.arange(N) < limits[:, None]
    np.testing.assert_array_equal(out.alive, inside)
    np.testing.assert_array_equal(out.tokens, np.where(inside, base.tokens, 0))
    np.testing.assert_allclose(out.logps, np.where(inside, base.logps, 0), rtol=0, atol=1e-6)


# ---- the cache


@pytest.mark.parametrize("length", [1, 2, 16, 17, 18, 39])
def test_any_length_has_the_beginning_of_a_longer_one(base, length):
    out = completions(length=length)
    np.testing.assert_array_equal(out.tokens, base.tokens[:, :length])
    np.testing.assert_allclose(out.logps, base.logps[:, :length], rtol=0, atol=1e-5)


def test_a_cache_that_grows_is_a_cache_that_is_large_from_the_start(base, monkeypatch):
    chunk = decode._chunk(N)
    assert chunk * 4 == N and decode.rooms_of(4, 44, chunk) == [44]
    for other in ([14, 24, 34, 44], [24, 44]):
        jax.clear_caches()
        monkeypatch.setattr(decode, "rooms_of", lambda *_, other=other: other)
        out = completions()
        np.testing.assert_array_equal(out.tokens, base.tokens)
        np.testing.assert_allclose(out.logps, base.logps, rtol=0, atol=1e-5)
    jax.clear_caches()


@pytest.mark.parametrize(("read", "steps"), [(0, 1), (0, 40), (63, 128), (511, 1024), (99, 15), (2, 16), (7, 700)])
def test_rooms_hold_whole_chunks_and_are_few(read, steps):
    chunk = decode._chunk(steps)
    assert chunk <= decode.CHUNK and -steps % chunk <= chunk / 2
    whole = read + chunk * -(-steps // chunk)
    rooms = decode.rooms_of(read, whole, chunk)
    assert rooms[-1] == whole and rooms == sorted(set(rooms)) and len(rooms) < 10
    assert all((b - a) % chunk == 0 for a, b in zip([read, *rooms], rooms))


def test_what_is_kept_of_the_cache_is_that_of_the_training_array():
    out = completions(keep=("position", "k"))
    tokens = PROMPTS.shape[1] + N
    assert out.kept["position"].shape == (ROWS, tokens) and out.kept["k"].shape == (2, ROWS, 2, 4, tokens)
    seen = np.concatenate([np.repeat(SEEN, G, 0), out.alive], 1)
    seen[:, -1] = False  # the last token is drawn and not read
    np.testing.assert_array_equal(out.kept["position"], np.where(seen, seen.cumsum(1) - 1, -1))


@pytest.mark.parametrize("original", [5 + N - 1, 5 + N])
@pytest.mark.parametrize("by", [sample, functools.partial(sample_queue, slots=4), sample_until, speculate])
def test_frequencies_are_those_of_the_training_array(by, original):
    """Longrope chooses its list by the room for a text: prompt and answer, however many columns a cache has now."""
    scaling = RopeScaling("longrope", 4.0, original, short=(1.0, 1.0), long=(3.0, 9.0))
    model = bind(dataclasses.replace(CONFIG, rope_scaling=scaling))
    out = by(
        PARAMS, PROMPTS, SEEN, jax.random.key(3), apply=model.apply, init_cache=model.init_cache, length=N,
        end_tokens=NEVER, pad_token=0,
    )  # fmt: skip
    out = out[0] if isinstance(out, tuple) else out
    tokens = np.concatenate([PROMPTS, np.asarray(out.tokens)], 1)
    logits = jax.jit(model.apply)(PARAMS, tokens, np.concatenate([SEEN, np.ones((3, N), bool)], 1))[0][:, 4:-1]
    logps = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens[:, 5:, None], 2)[..., 0]
    np.testing.assert_allclose(out.logps, logps, rtol=0, atol=1e-5)


# ---- replay


@pytest.mark.parametrize("how", [Sampling(), Sampling(0.7, 9, 0.9, 0.02), Sampling(0.0)], ids=["1", "all", "greedy"])
def test_a_replay_has_the_same_bits(base, how):
    """And not only near ones: a clip at a ratio of 1 and tests of exact equality are built on it."""
    end = an_end(base)
    first = completions(how=how, end_tokens=(end,))
    again = completions(how=how, end_tokens=(end,), forced=first.tokens)
    for name in ("tokens", "logps", "alive", "ended"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name), err_msg=name)


def test_other_tokens_are_scored_as_the_teacher_scores_them():
    rng = np.random.default_rng(0)
    forced = rng.integers(0, 29, (ROWS, N)).astype(np.int32)
    how = Sampling(0.7)
    out = completions(forced=forced, how=how)
    np.testing.assert_array_equal(out.tokens, forced)
    tokens = np.concatenate([np.repeat(PROMPTS, G, 0), forced], 1)
    seen = np.concatenate([np.repeat(SEEN, G, 0), np.ones_like(forced, bool)], 1)
    logits = transform(jax.jit(MODEL.apply)(PARAMS, tokens, seen)[0][:, PROMPTS.shape[1] - 1 : -1], how)
    expected = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), forced[..., None], 2)[..., 0]
    np.testing.assert_allclose(out.logps, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_a_score_has_the_bits_of_what_was_sampled(base, shared_prefix):
    """Of rows that ended, were cut off or were stopped by a text, and of one that was stopped before its first token.
    What stands behind an end is not read."""
    how, ends = Sampling(0.7, top_p=0.9, repetition_penalty=1.3), (an_end(base),)
    given = {
        "apply": MODEL.apply, "init_cache": MODEL.init_cache, "end_tokens": ends, "pad_token": 0, "how": how,
        "group": G, "shared_prefix": shared_prefix,
    }  # fmt: skip
    out = completions(how=how, end_tokens=ends, shared_prefix=shared_prefix, limits=np.array([N, 9, N, N, N, 1]))
    assert out.ended.any() and not out.ended.all()
    alive = out.alive & (np.arange(N) < np.array([N, N, 2, N, 0, N])[:, None])
    logps = score(PARAMS, PROMPTS, SEEN, np.where(alive, out.tokens, 28), alive, **given)
    np.testing.assert_array_equal(logps, np.where(alive, out.logps, 0))
    assert (np.asarray(logps)[alive] < 0).all()
    traced = jax.jit(lambda tokens, alive: score(PARAMS, PROMPTS, SEEN, tokens, alive, **given))
    np.testing.assert_allclose(traced(out.tokens, alive), logps, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="row 2 of alive goes on behind its end"):
        score(PARAMS, PROMPTS, SEEN, out.tokens, alive & (np.arange(6) != 2)[:, None] | (np.arange(N) == 3), **given)
    with pytest.raises(ValueError, match=r"alive has shape \(6, 39\), expected \[B, N\] with N=40 \(from tokens\)"):
        score(PARAMS, PROMPTS, SEEN, out.tokens, alive[:, 1:], **given)


def test_a_beginning_that_is_given_is_gone_on_from(base):
    forced = np.where(np.arange(N) < 6, base.tokens, -1)
    out = completions(forced=forced)
    np.testing.assert_array_equal(out.tokens, base.tokens)
    forced[:, 2] = (forced[:, 2] + 1) % 29
    other = completions(forced=forced)
    np.testing.assert_array_equal(other.tokens[:, :6], forced[:, :6])
    assert (other.tokens[:, 6:] != base.tokens[:, 6:]).any()


# ---- what is drawn from


def test_entropies_are_those_of_the_distributions(base):
    how = Sampling(0.9, 7, 0.95)
    out = completions(how=how, entropies=True, end_tokens=(an_end(base),))
    tokens = np.concatenate([np.repeat(PROMPTS, G, 0), out.tokens], 1)
    seen = np.concatenate([np.repeat(SEEN, G, 0), out.alive], 1)
    logits = transform(jax.jit(MODEL.apply)(PARAMS, tokens, seen)[0][:, PROMPTS.shape[1] - 1 : -1], how)
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    expected = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
    np.testing.assert_allclose(out.entropies, np.where(out.alive, expected, 0), rtol=0, atol=1e-5)
    assert out.entropies[out.alive].max() > 0.5 and completions().entropies is None


def test_every_row_has_its_own_temperature(base):
    temperatures = np.float32([1, 0, 0.5, 0, 2, 1])
    out = completions(how=Sampling(temperature=temperatures))
    np.testing.assert_array_equal(out.tokens[[0, 5]], base.tokens[[0, 5]])
    np.testing.assert_array_equal(out.tokens[[1, 3]], completions(how=Sampling(0.0)).tokens[[1, 3]])
    np.testing.assert_array_equal(out.tokens[2], completions(how=Sampling(0.5)).tokens[2])


def test_what_is_not_allowed_is_not_drawn_and_the_rest_shares_its_probability(base):
    common = np.bincount(base.tokens.ravel(), minlength=29).argsort()[::-1][:3]
    allowed = ~np.isin(np.arange(29), common)
    for temperature in (1.0, 0.0):
        out = completions(how=Sampling(temperature, allowed=allowed))
        assert not np.isin(out.tokens, common).any()
    logits = jnp.log(jnp.array([[0.5, 0.2, 0.2, 0.1]]))
    got = jax.nn.softmax(transform(logits, Sampling(top_p=0.7, allowed=np.array([False, True, True, True]))))
    np.testing.assert_allclose(got, [[0, 0.5, 0.5, 0]], atol=1e-6)


def test_no_row_ends_before_its_least_length(base):
    common = tuple(int(x) for x in np.bincount(base.tokens.ravel(), minlength=29).argsort()[::-1][:12])
    assert completions(end_tokens=common).alive.sum(1).min() < 9
    least = np.array([9, 0, 9, 20, 9, 9])
    how = Sampling(min_length=least, end_tokens=common)
    out = completions(how=how, end_tokens=common)
    early = np.arange(N) < least[:, None]
    assert not np.isin(out.tokens, common)[early].any() and (out.alive.sum(1) > least).all()
    # the scorer that is told the index speaks of the same distribution
    tokens = np.concatenate([np.repeat(PROMPTS, G, 0), out.tokens], 1)
    seen = np.concatenate([np.repeat(SEEN, G, 0), out.alive], 1)
    logits = jax.jit(MODEL.apply)(PARAMS, tokens, seen)[0][:, PROMPTS.shape[1] - 1 : -1]
    flat = transform(logits, how.replace(min_length=least[:, None, None]), np.tile(np.arange(N), (ROWS, 1)))
    logps = np.take_along_axis(np.asarray(jax.nn.log_softmax(flat)), out.tokens[..., None], 2)[..., 0]
    np.testing.assert_allclose(out.logps, np.where(out.alive, logps, 0), rtol=0, atol=1e-5)


def test_numbers_and_limits_are_not_another_program():
    traces = []

    def apply(params, tokens, seen, cache):
        traces.append(tokens.shape)
        return MODEL.apply(params, tokens, seen, cache)

    ask = functools.partial(completions, apply=apply)
    ask(how=Sampling(np.full(ROWS, 0.5, np.float32)), limits=np.full(ROWS, 3))
    count = len(traces)
    ask(how=Sampling(np.full(ROWS, 1.5, np.float32)), limits=np.full(ROWS, 30), forced=np.full((ROWS, N), -1))
    assert len(traces) == count


# ---- mistakes


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"limits": np.full(ROWS, N + 1)}, f"limits must be from 1 to length={N}"),
        ({"limits": np.zeros(ROWS, int)}, f"limits must be from 1 to length={N}"),
        ({"limits": np.ones(3, int)}, r"limits has shape \(3,\), expected \[6\]"),
        ({"forced": np.ones((ROWS, 3), int)}, r"forced has shape \(6, 3\), expected \[6, 40\]"),
        ({"how": Sampling(temperature=np.ones(4))}, r"temperature has shape \(4,\)"),
        ({"how": Sampling(temperature=np.array([1, 1, 1, 1, 1, -1.0]))}, "temperature must be at least 0"),
        ({"how": Sampling(allowed=np.zeros(29, bool))}, "allowed forbids every token"),
        ({"how": Sampling(allowed=np.ones(28, bool))}, r"allowed has shape \(28,\), expected \[29\]"),
        ({"how": Sampling(min_length=3)}, "min_length holds end_tokens back: give both"),
    ],
)
def test_bad_input_is_a_sentence(more, message):
    with pytest.raises(ValueError, match=message):
        completions(**more)


def test_a_prompt_longer_than_the_cache_is_a_sentence():
    with pytest.raises(ValueError, match="5 tokens do not fit a cache for 4"):
        MODEL.apply(PARAMS, PROMPTS, SEEN, MODEL.init_cache(3, 4))


def test_a_scorer_that_does_not_say_the_index_is_told_so():
    with pytest.raises(ValueError, match="min_length depends on how many tokens were drawn"):
        transform(jnp.zeros((2, 4)), Sampling(min_length=2, end_tokens=(1,)))


def test_no_logits_of_a_whole_prompt_are_made():
    """They would be the largest array of all: [P, T, V]."""
    config = Config(vocab=5000, layers=1, width=8, heads=1, kv_heads=1, head_width=8, hidden=8)
    model, (rows, tokens) = bind(config), (4, 64)
    params = jax.eval_shape(lambda: init(config, jax.random.key(0)))

    def ask(params, prompts, seen):
        return sample(
            params, prompts, seen, jax.random.key(0), apply=model.apply, init_cache=model.init_cache, length=2,
            end_tokens=NEVER, pad_token=0,
        ).tokens  # fmt: skip

    prompts = jax.ShapeDtypeStruct((rows, tokens), jnp.int32), jax.ShapeDtypeStruct((rows, tokens), bool)
    needed = jax.jit(ask).lower(params, *prompts).compile().memory_analysis().temp_size_in_bytes
    assert needed < rows * tokens * config.vocab * 4 / 4


def test_a_prompt_may_end_with_an_end_token(base):
    """As chat templates do; nothing of the answer has been said yet."""
    out = completions(end_tokens=tuple(int(x) for x in PROMPTS[:, -1]))
    assert out.alive[:, 0].all() and out.alive.sum() > ROWS
