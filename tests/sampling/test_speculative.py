"""Guessing ahead: the samples are those of the plain loop, whatever is guessed, in fewer readings of the model."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from pt_jax.models import Config, bind, init
from pt_jax.models.cache import forget
from pt_jax.sampling import Draft, Sampling, sample, speculate
from pt_jax.sampling.speculative import look_up

V, N = 29, 24
CONFIG = Config(vocab=V, layers=2, width=16, heads=2, kv_heads=1, head_width=8, hidden=16, eps=1e-3, windows=(0, 5))
SMALL = Config(vocab=V, layers=1, width=16, heads=2, kv_heads=1, head_width=8, hidden=16, eps=1e-3)
MODEL = bind(CONFIG)


def weights(config, seed=0):
    large = lambda x: x * 9 if x.ndim > 2 or x.shape[0] == V else x
    return jax.tree.map(large, init(config, jax.random.key(seed)))


PARAMS = weights(CONFIG)
NEAR = jax.tree.map(lambda x: x * (1 + 0.05 * jax.random.normal(jax.random.key(3), x.shape)), PARAMS)
PROMPTS = np.array([[3, 3, 5, 6, 7], [3, 3, 3, 3, 4], [9, 3, 0, 9, 3]], np.int32)
SEEN = np.array([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]], bool)
EVERYTHING = Sampling(
    np.float32([0.9, 0.5, 1.2, 0.7, 0.0, 1.0]), top_k=20, top_p=0.97, min_p=0.001, min_length=2,
    end_tokens=jnp.array([3, 17]), repetition_penalty=1.1, frequency_penalty=-0.3, presence_penalty=0.2,
)  # fmt: skip
# Tiny programs compile longer than they run: half as long like this.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def settings(how, **more):
    return {"apply": MODEL.apply, "init_cache": MODEL.init_cache, "length": N, "end_tokens": (3, 17), "pad_token": 3,
            "group": 2, "how": how, "prompt_ids": np.array([4, 0, 9])} | more  # fmt: skip


@functools.cache
def plain(name):
    how = {"everything": EVERYTHING, "greedy": Sampling(0.0)}[name]
    out = jit(lambda: sample(PARAMS, PROMPTS, SEEN, jax.random.key(1), **settings(how)))()
    return jax.tree.map(np.asarray, out)


DRAFTS = {
    "look-up": None,
    "itself": Draft(PARAMS, *MODEL),
    "near": Draft(NEAR, *MODEL),
    "another": Draft(weights(SMALL, 5), *bind(SMALL)),
}


def assert_same(got, expected):
    for name in ("tokens", "alive", "ended"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(got.logps, expected.logps, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("draft", "ahead"), [("look-up", 4), ("itself", 4), ("another", 1)])
def test_every_sample_is_that_of_the_plain_loop(draft, ahead):
    """With all options on, a temperature a row, rows that end at many places, groups, and windows."""
    expected = plain("everything")
    assert len(set(expected.alive.sum(1))) > 2 and 0 < expected.ended.sum() < 6
    out, reads = jit(
        lambda: speculate(
            PARAMS, PROMPTS, SEEN, jax.random.key(1), draft=DRAFTS[draft], ahead=ahead, **settings(EVERYTHING)
        )
    )()
    assert_same(out, expected)
    tokens = expected.alive.sum(1)
    assert (reads <= tokens).all() and (reads >= np.ceil(tokens / (ahead + 1))).all()
    if draft == "itself":
        np.testing.assert_array_equal(reads, np.ceil(tokens / (ahead + 1)))


@pytest.mark.parametrize(("draft", "share"), [("look-up", 0.9), ("near", 0.7)])
def test_good_guesses_save_readings(draft, share):
    expected = plain("greedy")
    out, reads = jit(
        lambda: speculate(PARAMS, PROMPTS, SEEN, jax.random.key(1), draft=DRAFTS[draft], **settings(Sampling(0.0)))
    )()
    assert_same(out, expected)
    assert np.asarray(reads).sum() < share * expected.alive.sum()


def test_limits_are_kept():
    limits = np.array([1, 2, 3, 4, 5, 24])
    how = settings(Sampling(0.0), limits=limits, end_tokens=(-1, -2))
    out, _ = jit(lambda: speculate(PARAMS, PROMPTS, SEEN, jax.random.key(1), draft=DRAFTS["itself"], **how))()
    assert np.asarray(out.alive).sum(1).tolist() == limits.tolist() and not np.asarray(out.ended).any()


def test_completions_come_as_often_as_their_probability_says():
    """A table of bigrams with a draft that is wrong in its own way: every completion against its exact probability."""
    tables = np.random.default_rng(0).normal(0, 1, (2, 4, 4)).astype(np.float32)
    apply = lambda params, tokens, seen, cache: (params[tokens], cache)
    fresh = lambda rows, length: {"read": jnp.zeros((rows, length))}
    how = Sampling(0.8, presence_penalty=0.7)
    out, reads = speculate(
        tables[0], np.array([[1]]), np.ones((1, 1), bool), jax.random.key(2), apply=apply, init_cache=fresh, length=3,
        end_tokens=(3,), pad_token=0, group=100_000, how=how, draft=Draft(tables[1], apply, fresh), ahead=2,
        forget=lambda cache, columns: cache,
    )  # fmt: skip
    said = [tuple(row) for row in np.where(out.alive, out.tokens, -1).tolist()]
    expected = {}
    for tokens in itertools.product(range(4), repeat=3):
        tokens = tokens[: tokens.index(3) + 1] if 3 in tokens else tokens
        p, last = 1.0, 1
        for i, token in enumerate(tokens):
            row = (np.float64(tables[0][last]) - 0.7 * np.isin(range(4), tokens[:i])) / 0.8
            p, last = p * scipy.special.softmax(row)[token], token
        expected[(*tokens, -1, -1)[:3]] = p
    rows, count = np.unique(said, axis=0, return_counts=True)
    shares = np.array([expected[tuple(row)] for row in rows.tolist()])
    assert abs(shares.sum() - 1) < 1e-3
    assert scipy.stats.chisquare(count, shares / shares.sum() * 100_000).pvalue > 1e-3
    assert 1.2 < np.mean(reads) < 2.8  # some guesses were right and some were not


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([5, 6, 7, 8, 1, 5, 6], [7, 8, 1, 5]),
        ([5, 6, 7, 2, 6, 8, 9, 5, 6], [7, 2, 6, 8]),  # the longest match, not the latest
        ([5, 6, 7, 5, 6, 8, 5, 6], [8, 5, 6, 8]),  # of equals the latest; and what is there comes again
        ([1, 2, 3, 4], [4, 4, 4, 4]),  # no match
        ([4], [0, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("padding", [0, 3])
def test_looking_up(text, expected, padding):
    """Padding is no text, even where it would match."""
    row = np.array([*[text[-1]] * padding, *text, 0, 0, 0, 0, 0, 0])
    got = look_up(jnp.asarray(row), padding, padding + len(text), count=4, match=3)
    assert got.tolist() == expected


def test_a_cache_forgets_what_it_read_last():
    """As if it had never been read: the next token's logits, in a cache with padding too."""
    apply = jit(MODEL.apply)
    cache = apply(PARAMS, PROMPTS, SEEN, MODEL.init_cache(3, 12))[1]
    more, seen = np.full((3, 3), 7, np.int32), np.array([[1, 1, 1], [0, 1, 1], [0, 0, 0]], bool)
    other = forget(apply(PARAMS, more, seen, cache)[1], 3)
    for name in ("position", "count", "end"):
        np.testing.assert_array_equal(other[name], cache[name])
    after = [apply(PARAMS, PROMPTS[:, :2], SEEN[:, 3:], c)[0] for c in (cache, other)]
    np.testing.assert_array_equal(*after)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"ahead": 0}, "ahead must be above 0"),
        ({"match": 0}, "match must be"),
        ({"ahead": 17}, "ahead=17 for a cache whose rings forget 16 at most; give init_cache more slack"),
    ],
)
def test_bad_numbers_are_sentences(more, message):
    with pytest.raises(ValueError, match=message):
        speculate(PARAMS, PROMPTS, SEEN, jax.random.key(1), **settings(Sampling()), **more)


@pytest.mark.parametrize("draft", ["look-up", "itself"])
def test_guesses_beyond_the_learned_positions_change_nothing(draft):
    """A completion that ends at the last of them: there is no number for what is guessed behind it."""
    config = Config(
        vocab=V, layers=2, width=16, heads=2, kv_heads=2, head_width=8, hidden=16, max_length=5 + N,
        learned_positions=True, norm="layer", gated=False, activation="gelu_tanh", qk_norm=False,
    )  # fmt: skip
    model, params = bind(config), weights(config)
    ask = settings(Sampling(0.8), end_tokens=(), group=1) | {"apply": model.apply, "init_cache": model.init_cache}
    expected = sample(params, PROMPTS, SEEN, jax.random.key(1), **ask)
    draft = None if draft == "look-up" else Draft(params, *model)
    got, _ = speculate(params, PROMPTS, SEEN, jax.random.key(1), draft=draft, ahead=4, **ask)
    assert_same(got, expected)
    assert np.isfinite(expected.logps).all()
