"""Penalties against a loop in plain numpy, and the record of what was said: of the sampler and of the scorer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from pt_jax import logps
from pt_jax.models import Config, bind, init
from pt_jax.recipes.score import make_score
from pt_jax.sampling import Sampling, sample, sample_queue, scored_logits, transform

V, N, END = 13, 14, 3
CONFIG = Config(vocab=V, layers=1, width=16, heads=2, kv_heads=1, head_width=8, hidden=16, eps=1e-3, qk_norm=False)
MODEL = bind(CONFIG)
PARAMS = jax.tree.map(lambda x: x * 12 if x.ndim > 2 or x.shape[0] == V else x, init(CONFIG, jax.random.key(0)))
T = 6
SEEN = np.arange(T) >= T - np.array([2, 6, 1, 4])[:, None]
PROMPTS = np.where(SEEN, np.random.default_rng(0).integers(0, V, (4, T)), END).astype(np.int32)
ALL = Sampling(
    0.8, top_k=11, top_p=0.95, min_p=0.01, allowed=np.arange(V) != 5, min_length=3, end_tokens=(END, 9),
    repetition_penalty=1.4, frequency_penalty=0.3, presence_penalty=-0.6,
)  # fmt: skip
# the same with penalties that do nothing: one program serves these and more
NONE = Sampling(repetition_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0)


def by_the_definition(logits, tokens, seen, mask, repetition=1.0, frequency=0.0, presence=0.0):
    """Token by token in float64, reading those before; OpenAI's penalties count answers, CTRL's the prompt too."""
    out = np.array(logits, np.float64)
    for b, t, v in np.ndindex(out.shape):
        before = [int(x) for x, s in zip(tokens[b, : t + 1], seen[b]) if s]
        answered = [int(x) for x, m in zip(tokens[b, : t + 1], mask[b]) if m]
        x = out[b, t, v]
        if v in before:
            x = x * repetition if x < 0 else x / repetition
        out[b, t, v] = x - answered.count(v) * frequency - (v in answered) * presence
    return out


def a_batch(rows=3, columns=9):
    """Texts with padding on both sides, answers in several pieces, and few tokens, so that they repeat."""
    rng = np.random.default_rng(1)
    seen = np.ones((rows, columns), bool)
    seen[0, :3], seen[1, 6:] = False, False
    mask = seen & (np.arange(columns) >= np.array([5, 2, 1])[:, None])
    mask[2, 4:6] = False  # something was put in between
    tokens = rng.integers(0, 5, (rows, columns)).astype(np.int32)
    return rng.normal(0, 3, (rows, columns, 7)).astype(np.float32), tokens, seen, mask


@pytest.mark.parametrize("numbers", [(1.7, 0.0, 0.0), (1.0, 0.4, 0.0), (1.0, 0.0, 0.9), (0.6, -0.3, 0.5)], ids=str)
def test_the_definition(numbers):
    logits, tokens, seen, mask = a_batch()
    expected = by_the_definition(logits, tokens, seen, mask, *numbers)
    assert np.abs(expected - logits).max() > 0.3
    names = ("repetition_penalty", "frequency_penalty", "presence_penalty")
    how = Sampling(**dict(zip(names, numbers)))
    got = scored_logits(jnp.asarray(logits), tokens, seen, mask, how)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    # those that do nothing may be left out
    alone = Sampling(**{name: x for name, x in zip(names, numbers) if x != getattr(NONE, name)})
    np.testing.assert_array_equal(scored_logits(jnp.asarray(logits), tokens, seen, mask, alone), got)


def test_penalties_that_do_nothing_change_no_bit():
    logits, tokens, seen, mask = a_batch()
    np.testing.assert_array_equal(scored_logits(jnp.asarray(logits), tokens, seen, mask, NONE), logits)


def test_penalties_come_before_what_cuts_off():
    """The likeliest after the penalty is what greedy takes, and what min_p measures by."""
    logits, tokens = jnp.array([[[2.0, 1.5, 0.0]]]), np.zeros((1, 1), int)
    all_seen, nothing = np.ones((1, 1), bool), np.zeros((1, 1), bool)
    for more in ({"temperature": 0.0}, {"top_k": 1}, {"min_p": 1.0}, {"top_p": 0.1}):
        got = scored_logits(logits, tokens, all_seen, nothing, Sampling(repetition_penalty=2.0, **more))
        assert np.isfinite(np.asarray(got)).tolist() == [[[False, True, False]]], more


def test_the_least_length_is_counted_in_sampled_tokens():
    logits, tokens, seen, mask = a_batch()
    got = scored_logits(jnp.asarray(logits), tokens, seen, mask, Sampling(min_length=2, end_tokens=(6,)))
    for b in range(3):
        for t in range(9):
            early = mask[b, : t + 1].sum() < 2
            assert np.isneginf(got[b, t]).tolist() == [False] * 6 + [early], (b, t)


def test_rows_may_have_their_own_numbers():
    logits, tokens, seen, mask = a_batch()
    numbers = np.float32([[0.7, 1.4, 0.2, 0.9], [1.0, 1.0, 0.0, 0.0], [1.5, 0.5, -0.2, 0.1]])
    fields = ("temperature", "repetition_penalty", "frequency_penalty", "presence_penalty")
    got = scored_logits(jnp.asarray(logits), tokens, seen, mask, Sampling(**dict(zip(fields, numbers.T))))
    for b, row in enumerate(numbers):
        one = slice(b, b + 1)
        alone = Sampling(**dict(zip(fields, row)))
        expected = scored_logits(jnp.asarray(logits[one]), tokens[one], seen[one], mask[one], alone)
        np.testing.assert_allclose(got[one], expected, rtol=1e-6)


def test_gradients_are_those_of_the_definition():
    logits, tokens, seen, mask = a_batch()
    how = Sampling(0.7, repetition_penalty=1.4, frequency_penalty=0.3, presence_penalty=0.5)
    sum_of = lambda logits: (logps.token_logps(scored_logits(logits, tokens, seen, mask, how), tokens) * mask).sum()
    got = jit(jax.grad(sum_of))(jnp.asarray(logits))

    def loss(logits):
        p = by_the_definition(logits, tokens, seen, mask, 1.4, 0.3, 0.5) / 0.7
        p = scipy.special.log_softmax(p, -1)
        return sum(p[b, t - 1, tokens[b, t]] for b, t in zip(*np.nonzero(mask)))

    for at in [(0, 4, 2), (1, 3, 0), (2, 7, 4), (2, 0, 1), (0, 7, tokens[0, 8])]:
        up, down = (np.array(logits, np.float64) for _ in range(2))
        up[at] += 1e-5
        down[at] -= 1e-5
        np.testing.assert_allclose(got[at], (loss(up) - loss(down)) / 2e-5, rtol=1e-3, atol=1e-5)


# ---- the sampler and the scorer


# Tiny programs compile longer than they run: half as long like this.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
compiled = {
    by: jit(functools.partial(by, apply=MODEL.apply, init_cache=MODEL.init_cache, length=N, group=3, **more))
    for by, more in ((sample, {}), (sample_queue, {"slots": 6}))
}


def completions(how, by=sample, **more):
    ends = {"end_tokens": jnp.array([END, 9]), "pad_token": END}
    return jax.tree.map(np.asarray, compiled[by](PARAMS, PROMPTS, SEEN, jax.random.key(1), how=how, **ends | more))


SCORE = jit(lambda how, *data: make_score(MODEL.apply, how)(PARAMS, *data))


def scored(how, out):
    repeated = lambda x: np.repeat(x, 3, 0)
    tokens = np.concatenate([repeated(PROMPTS), out.tokens], 1)
    seen = np.concatenate([repeated(SEEN), out.alive], 1)
    mask = np.concatenate([np.zeros((12, T), bool), out.alive], 1)
    return np.asarray(SCORE(how, tokens, seen, mask))[:, T:]


@pytest.mark.parametrize("by", [sample, sample_queue], ids=["loop", "queue"])
def test_what_was_sampled_is_scored_as_it_was_sampled(by):
    """With every option at once, and with each penalty alone: all of them are in the scorer's answer."""
    out = completions(ALL, by)
    assert out.alive.sum() > 60 and out.ended.any()
    expected = np.where(out.alive, scored(ALL, out), 0)
    np.testing.assert_allclose(out.logps, expected, rtol=0, atol=1e-5)
    for name in ("repetition_penalty", "frequency_penalty", "presence_penalty"):
        other = scored(ALL.replace(**{name: getattr(NONE, name)}), out)
        assert np.abs(np.where(out.alive, other, 0) - expected).max() > 0.1, name


def test_queue_and_loop_sample_the_same():
    queue, loop = completions(ALL, sample_queue), completions(ALL)
    for name in ("tokens", "alive", "ended"):
        np.testing.assert_array_equal(getattr(queue, name), getattr(loop, name))


def test_a_replay_has_the_same_bits():
    first = completions(ALL)
    again = completions(ALL, forced=first.tokens)
    np.testing.assert_array_equal(again.tokens, first.tokens)
    np.testing.assert_array_equal(again.logps, first.logps)


def test_a_strong_penalty_says_nothing_twice():
    once = NONE.replace(temperature=np.float32(0.0), presence_penalty=1e6)
    out = completions(once, end_tokens=jnp.array([-1, -1]))
    assert all(sorted(row[:V]) == list(range(V)) for row in out.tokens.tolist())


def test_what_is_not_asked_for_is_not_paid_for():
    """A record of tokens in the loop. The model is traced once more alone, to see how many tokens it knows."""
    traces = []

    def apply(params, tokens, seen, cache):
        traces.append(tokens.shape)
        return MODEL.apply(params, tokens, seen, cache)

    def program(how):
        return str(jax.make_jaxpr(lambda: completions_traced(how, apply))())

    def completions_traced(how, apply):
        return sample(
            PARAMS, PROMPTS, SEEN, jax.random.key(1), apply=apply, init_cache=MODEL.init_cache, length=N,
            end_tokens=(END,), pad_token=0, how=how,
        ).tokens  # fmt: skip

    plain = program(Sampling())
    assert traces == [(1, 1), (4, T - 1), (4, 1)] and "scatter" not in plain
    counts = program(Sampling(presence_penalty=1.0))
    assert "scatter-add" in counts
    repeats = program(Sampling(repetition_penalty=1.1))
    assert "scatter-max" in repeats and "scatter-add" not in repeats


# ---- mistakes


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0 and finite, got 0.0"),
        ({"repetition_penalty": np.inf}, "repetition_penalty must be above 0 and finite"),
        ({"frequency_penalty": np.nan}, "frequency_penalty must be finite, got nan"),
        ({"presence_penalty": -np.inf}, "presence_penalty must be finite"),
        (
            {"presence_penalty": np.ones(5)},
            r"presence_penalty has shape \(5,\); give one number, or one for each of 12",
        ),
    ],
)
def test_bad_numbers_are_refused_by_name(how, message):
    with pytest.raises(ValueError, match=message):
        sample(
            PARAMS, PROMPTS, SEEN, jax.random.key(1), apply=pytest.fail, init_cache=pytest.fail, length=N, group=3,
            end_tokens=(), pad_token=0, how=Sampling(**how),
        )  # fmt: skip


def test_a_scorer_that_is_not_told_what_came_before_is_told_so():
    logits, tokens, seen, mask = a_batch()
    penalty = Sampling(frequency_penalty=1.0)
    with pytest.raises(ValueError, match="the penalties depend on the tokens before; give transform the history"):
        transform(jnp.asarray(logits), penalty)
    for how in (penalty, Sampling(min_length=1, end_tokens=(1,))):
        with pytest.raises(ValueError, match="depend on which tokens were sampled; give the mask"):
            scored_logits(jnp.asarray(logits), tokens, seen, None, how)
        with pytest.raises(ValueError, match="seen must be bool here"):
            scored_logits(jnp.asarray(logits), tokens, seen.astype(np.int32), mask, how)
        with pytest.raises(ValueError, match=r"mask has shape \(3, 8\), expected \[B, T\] with T=9"):
            scored_logits(jnp.asarray(logits), tokens, seen, mask[:, 1:], how)


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 0.4}, {"min_p": 0.95}])
def test_a_token_that_was_sampled_is_scored_even_where_rounding_cuts_it_off(cut):
    """In 16 bits the sampler's logits and the trainer's are not the same, and the last token that passes may not."""
    logits = np.log(np.float32([[[5, 4, 1], [5, 4, 1], [5, 4, 1]]]))
    tokens, seen = np.array([[2, 1, 1]]), np.ones((1, 3), bool)
    for more in ({}, {"presence_penalty": 0.0}):
        score = lambda mask, more=more: logps.token_logps(
            scored_logits(jnp.asarray(logits), tokens, seen, mask, Sampling(**cut, **more)), tokens
        )
        np.testing.assert_allclose(score(np.array([[0, 1, 0]], bool)), [[0, np.log(4 / 9), -np.inf]], rtol=1e-6)
    assert np.isneginf(score(np.zeros((1, 3), bool))[0, 1:]).all()


def test_an_end_token_that_never_comes_holds_nothing_back():
    got = transform(jnp.zeros(4), Sampling(min_length=2, end_tokens=(-1, 1)), 0)
    np.testing.assert_array_equal(np.isneginf(got), [False, True, False, False])
    assert np.isfinite(transform(jnp.zeros(4), Sampling(min_length=2, end_tokens=()), 0)).all()
