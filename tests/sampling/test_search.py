"""The best of samples, and beam search against a look at every completion there is."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from pt_jax.models import Config, bind, init
from pt_jax.sampling import Completions, Sampling, beam_search, best_of, sample, timed

V, N, END = 4, 3, 2
TABLE = np.random.default_rng(4).normal(0, 1.5, (V, V)).astype(np.float32)
TABLE_MODEL = {
    "apply": lambda params, tokens, seen, cache: (params[tokens], cache),
    "init_cache": lambda rows, length: {"read": jnp.zeros((rows, length))},
    "end_tokens": (END,), "pad_token": 0,
}  # fmt: skip


def every_completion(start):
    """(log-probability, tokens) of all that end with the end token or have N tokens, the likeliest first."""
    logps = scipy.special.log_softmax(np.float64(TABLE), -1)
    found = {}
    for tokens in itertools.product(range(V), repeat=N):
        if END in tokens:
            tokens = tokens[: tokens.index(END) + 1]
        found[tokens] = sum(logps[a, b] for a, b in zip((start, *tokens), tokens))
    return sorted(((p, t) for t, p in found.items()), reverse=True)


def test_many_beams_find_the_likeliest_of_all_completions():
    prompts = np.array([[0, 1], [0, 3]], np.int32)
    out, scores = beam_search(
        TABLE, prompts, np.ones_like(prompts, bool), length=N, beams=16, length_penalty=0.0, **TABLE_MODEL
    )
    said = [tuple(t[a].tolist()) for t, a in zip(np.asarray(out.tokens), np.asarray(out.alive))]
    for p, start in enumerate((1, 3)):
        every, mine = every_completion(start), said[p * 16 : p * 16 + 16]
        assert len(set(mine)) == 16
        np.testing.assert_allclose(scores[p], [logp for logp, _ in every[:16]], atol=1e-5)
        by_tokens = {tokens: logp for logp, tokens in every}  # some are equally likely: the same steps in another order
        np.testing.assert_allclose(scores[p], [by_tokens[tokens] for tokens in mine], atol=1e-5)
    assert len({len(x) for x in said}) == N


CONFIG = Config(vocab=29, layers=1, width=16, heads=2, kv_heads=1, head_width=8, hidden=16, eps=1e-3, qk_norm=False)
MODEL = bind(CONFIG)
PARAMS = jax.tree.map(lambda x: x * 12 if x.ndim > 2 or x.shape[0] == 29 else x, init(CONFIG, jax.random.key(0)))
SETTINGS = {
    "apply": MODEL.apply, "init_cache": MODEL.init_cache, "length": 12, "end_tokens": (3, 17), "pad_token": 3,
}  # fmt: skip
PROMPTS = np.array([[3, 3, 5, 6, 7], [3, 3, 3, 3, 4], [9, 3, 0, 11, 2]], np.int32)
SEEN = np.array([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]], bool)


def test_a_row_does_not_depend_on_its_padding_and_company():
    ask = jax.jit(lambda prompts, seen: beam_search(PARAMS, prompts, seen, beams=4, **SETTINGS))
    out, scores = ask(PROMPTS, SEEN)
    assert len({row.tobytes() for row in np.asarray(out.tokens)}) == 12
    order = np.array([2, 0, 1])
    wide = [np.pad(x[order], ((0, 0), (2, 0)), constant_values=x.dtype.type(0)) for x in (PROMPTS, SEEN)]
    other, other_scores = ask(*wide)
    rows = (order[:, None] * 4 + np.arange(4)).ravel()
    np.testing.assert_array_equal(other.tokens, np.asarray(out.tokens)[rows])
    np.testing.assert_array_equal(other.alive, np.asarray(out.alive)[rows])
    np.testing.assert_allclose(other_scores, np.asarray(scores)[order], rtol=1e-5)


def test_one_beam_is_greedy():
    out, _ = beam_search(PARAMS, PROMPTS, SEEN, beams=1, **SETTINGS)
    greedy = sample(PARAMS, PROMPTS, SEEN, jax.random.key(0), how=Sampling(0.0), **SETTINGS)
    for name in ("tokens", "alive", "ended"):
        np.testing.assert_array_equal(getattr(out, name), getattr(greedy, name))


def test_the_best_sample_has_all_that_belongs_to_it():
    out = sample(PARAMS, PROMPTS, SEEN, jax.random.key(0), group=4, keep=("k",), entropies=True, **SETTINGS)
    best = best_of(out, np.asarray(out.logps.sum(-1)).reshape(3, 4))
    for p in range(3):
        row = 4 * p + int(np.argmax(np.asarray(out.logps.sum(-1))[4 * p : 4 * p + 4]))
        for name in ("tokens", "logps", "alive", "ended", "entropies"):
            np.testing.assert_array_equal(getattr(best, name)[p], getattr(out, name)[row], err_msg=name)


def test_an_impossible_sample_is_better_than_one_without_a_score():
    out = Completions(np.arange(4)[:, None], np.zeros((4, 1)), np.ones((4, 1), bool))
    scores = np.array([[np.nan, -np.inf], [-np.inf, -np.inf]])
    assert best_of(out, scores).tokens.tolist() == [[1], [2]]


def test_where_fewer_are_possible_than_there_are_beams_the_last_have_no_token():
    allowed = np.arange(V) % 2 == 1  # two tokens, and one of each may be a completion
    out, scores = beam_search(
        TABLE, np.array([[3]], np.int32), np.ones((1, 1), bool), length=1, beams=3, how=Sampling(allowed=allowed),
        **TABLE_MODEL | {"end_tokens": ()},
    )  # fmt: skip
    assert out.alive.sum(1).tolist() == [1, 1, 0] and sorted(out.tokens[:2, 0].tolist()) == [1, 3]
    assert scores[0, 1] > -50 and scores[0, 2] <= -1e9


def test_mistakes_are_sentences():
    out = Completions(np.zeros((4, 1), int), np.zeros((4, 1)), np.ones((4, 1), bool))
    with pytest.raises(ValueError, match=r"scores has shape \(3, 2\), expected \[P, G\] with P \* G = 4 rows"):
        best_of(out, np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"scores has shape \(4,\), expected \[P, G\]"):
        best_of(out, np.zeros(4))
    with pytest.raises(ValueError, match="prompt 1 has no score: those of all its samples are NaN"):
        best_of(out, np.array([[1, 2], [np.nan, np.nan]]))
    ask = lambda **more: beam_search(PARAMS, PROMPTS, SEEN, **SETTINGS | more)
    with pytest.raises(ValueError, match="beams must be above 0"):
        ask(beams=0)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        ask(beams=2, how=Sampling(0.0))
    with pytest.raises(ValueError, match="prompt 0 is empty or not left-padded"):
        beam_search(PARAMS, PROMPTS, ~SEEN, beams=2, **SETTINGS)


def test_the_best_of_timed_samples_is_found_too():
    out = timed(sample, PARAMS, PROMPTS, SEEN, jax.random.key(0), group=4, **SETTINGS)
    best = best_of(out, np.arange(12.0).reshape(3, 4))
    np.testing.assert_array_equal(best.tokens, out.tokens[3::4])
