"""The sampled distribution against its definition in plain numpy, and what is drawn against its probabilities."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from pt_jax.sampling import distribution, sample
from pt_jax.sampling.distribution import GREEDY, Sampling, draw, transform

V = 9
# ties at the top, ties where a cut falls, all equal, a token that is forbidden, and one that has everything
TIES = np.array(
    [
        [3.0, 1.0, 3.0, 2.0, 2.0, 2.0, 0.0, -1.0, -9.0],
        [0.0] * 9,
        [-np.inf, 1.0, 2.0, -np.inf, 2.0, 1.0, 0.5, 0.5, -3.0],
        [90.0, -90.0, 0.0, 0.0, 1.0, 1.0, -2.0, 3.0, 89.0],
    ],
    np.float32,
)
LOGITS = np.concatenate([TIES, np.random.default_rng(0).normal(0, 2, (12, V)).astype(np.float32)])


def by_the_definition(row, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """The probabilities [V] in float64, one token after the other; 0 for what is cut off and for nothing else."""
    row = [float(x) for x in row]
    if temperature == 0:
        return np.eye(len(row))[row.index(max(row))]
    weight = [np.exp((x - max(row)) / temperature) for x in row]
    p = [w / sum(weight) for w in weight]
    ranked = sorted(p, reverse=True)
    kept = []
    for x in p:
        likelier = [y for y in p if y > x]
        keep = top_k is None or len(likelier) < top_k
        # in the smallest set of likeliest tokens, or tied with its last one
        keep &= top_p is None or top_p == 1 or sum(likelier) < top_p - 1e-6
        keep &= min_p is None or x >= min_p * ranked[0] * (1 - 1e-6)
        kept.append(x if keep else 0.0)
    return np.array(kept) / sum(kept)


def probabilities(logits, how):
    return np.asarray(jax.nn.softmax(transform(jnp.asarray(logits), how)))


GRID = [
    {k: v for k, v in zip(("temperature", "top_k", "top_p", "min_p"), values) if v is not None}
    for values in itertools.product((1.0, 0.3, 2.5), (None, 1, 4, 50), (None, 0.05, 0.6, 1.0), (None, 0.0, 0.2, 1.0))
]


@pytest.mark.parametrize("names", sorted({tuple(h) for h in GRID}), ids="+".join)
def test_the_definition(names):
    program = jax.jit(transform)  # one for each choice of what is left out: the numbers are traced
    for how in (h for h in GRID if tuple(h) == names):
        got = program(LOGITS, Sampling(**how))
        expected = np.stack([by_the_definition(row, **how) for row in LOGITS])
        np.testing.assert_array_equal(np.isfinite(got), expected > 0, err_msg=str(how))
        np.testing.assert_allclose(jax.nn.softmax(got), expected, rtol=0, atol=2e-6, err_msg=str(how))


def test_nothing_asked_is_nothing_changed():
    """Log-probabilities of a plain model are those of its logits, to the last bit."""
    np.testing.assert_array_equal(transform(jnp.asarray(LOGITS), Sampling()), LOGITS)


def test_limits_that_limit_nothing_change_nothing():
    """Over a real vocabulary too, where the cumulative probability passes 1 by rounding before the last token."""
    logits = np.random.default_rng(0).normal(0, 3, (8, 30_000)).astype(np.float32)
    got = np.asarray(transform(jnp.asarray(logits), Sampling(top_k=30_000, top_p=1.0, min_p=0.0)))
    np.testing.assert_array_equal(got, logits)


def test_the_temperature_comes_before_the_limits():
    """At 0.5 the first of (4, 3, 2, 1) squared has 16/30: alone it is enough for 0.5, and at 1 it is not."""
    logits = np.log(np.float32([4, 3, 2, 1]))
    kept = lambda **how: int((probabilities(logits, Sampling(**how)) > 0).sum())
    assert (kept(temperature=0.5, top_p=0.5), kept(temperature=1.0, top_p=0.5)) == (1, 2)
    assert (kept(temperature=0.5, min_p=0.3), kept(temperature=1.0, min_p=0.3)) == (2, 3)


@pytest.mark.parametrize("shape", [(V,), (2, V), (2, 3, V)])
@pytest.mark.parametrize("how", [Sampling(0.7, 4, 0.6, 0.1), GREEDY], ids=["warm", "greedy"])
def test_any_number_of_axes(shape, how):
    logits = np.resize(LOGITS, shape)
    flat = np.stack([transform(jnp.asarray(row), how) for row in logits.reshape(-1, V)])
    np.testing.assert_allclose(transform(jnp.asarray(logits), how), flat.reshape(shape), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_result_is_float32(dtype):
    """bfloat16 has 8 bits: dividing in it makes ties of neighbours."""
    logits = jnp.asarray(LOGITS).astype(dtype)
    got = transform(logits, Sampling(temperature=0.7))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.asarray(logits, np.float32) / np.float32(0.7), rtol=1e-6)


# ---- temperature 0


@pytest.mark.parametrize(
    "limits", [{}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 2, "top_p": 1.0, "min_p": 0.3}], ids=str
)
def test_temperature_0_is_the_likeliest_and_the_first_of_equals(limits):
    got = probabilities(LOGITS, Sampling(temperature=0.0, **limits))
    np.testing.assert_array_equal(got, np.eye(V)[LOGITS.argmax(-1)])
    logps = jax.nn.log_softmax(transform(jnp.asarray(LOGITS), Sampling(temperature=0.0, **limits)))
    np.testing.assert_array_equal(logps.max(-1), 0)


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 0.7])
def test_gradients_are_finite(temperature):
    """Of the log-probability of what was drawn: a NaN on the side of a where that is not taken gets through here."""
    token = LOGITS.argmax(-1)[:, None]

    def nll(logits, t):
        how = Sampling(temperature=t, top_k=4, top_p=0.9, min_p=0.1)
        return -jnp.take_along_axis(jax.nn.log_softmax(transform(logits, how)), token, 1).sum()

    finite = jnp.asarray(LOGITS[np.isfinite(LOGITS).all(1)])
    token = token[np.isfinite(LOGITS).all(1)]
    of_logits, of_temperature = jax.jit(jax.grad(nll, (0, 1)))(finite, temperature)
    assert np.isfinite(of_logits).all() and np.isfinite(of_temperature)
    assert (np.abs(of_logits).sum() > 0) == (temperature > 0)


# ---- numbers


def test_another_number_is_not_another_program():
    traces = []

    @jax.jit
    def program(logits, how):
        traces.append(how)
        return transform(logits, how)

    for t, k, p, m in [(1.0, 3, 0.9, 0.1), (0.5, 1, 1.0, 0.0), (0.0, 9, 0.1, 1.0)]:
        got = program(LOGITS, Sampling(t, k, p, m))
        np.testing.assert_allclose(got, transform(jnp.asarray(LOGITS), Sampling(t, k, p, m)), rtol=1e-6)
    assert len(traces) == 1


def test_numbers_may_be_arrays():
    how = Sampling(jnp.float32(0.7), jnp.int32(3), jnp.float32(0.8), np.float32(0.1))
    plain = Sampling(0.7, 3, 0.8, 0.1)
    np.testing.assert_allclose(probabilities(LOGITS, how), probabilities(LOGITS, plain), rtol=1e-6)


def test_numbers_a_row_may_be_a_list():
    np.testing.assert_array_equal(Sampling([0.5, 1.5]).check().of_rows(2).temperature, [[0.5], [1.5]])


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", -0.1, "at least 0 and finite"), ("temperature", np.nan, "at least 0 and finite"),
        ("temperature", jnp.float32(-1), "at least 0 and finite"), ("temperature", np.inf, "at least 0 and finite"),
        ("top_k", 0, "at least 1"), ("top_k", -1, "at least 1"),
        ("top_p", 0.0, "above 0 and at most 1"), ("top_p", 1.1, "above 0 and at most 1"),
        ("top_p", np.nan, "above 0 and at most 1"),
        ("min_p", -0.1, "from 0 to 1"), ("min_p", 1.1, "from 0 to 1"),
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_refused_by_name(name, value, expected):
    with pytest.raises(ValueError, match=rf"^{name} must be {expected}, got {value}$"):
        transform(jnp.asarray(LOGITS), Sampling(**{name: value}))


@pytest.mark.parametrize(
    "how", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1.0}, {"min_p": 0.0}, {"min_p": 1.0}], ids=str
)
def test_the_ends_of_the_ranges_are_taken(how):
    assert np.isfinite(probabilities(LOGITS, Sampling(**how))).all()


# ---- drawing


@pytest.mark.parametrize(
    "how",
    [
        {}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 3}, {"top_p": 0.8}, {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)  # fmt: skip
def test_tokens_come_as_often_as_their_probability_says(how):
    logits, n = np.float32([0.5, -np.inf, 1.5, 1.5, -2.0, 0.0, -0.5]), 100_000
    expected = by_the_definition(logits, **how)
    keys = jax.random.split(jax.random.key(5), n)
    drawn = draw(keys, jnp.tile(transform(jnp.asarray(logits), Sampling(**how)), (n, 1)))
    assert drawn.dtype == jnp.int32
    count, likely = np.bincount(drawn, minlength=7), expected > 0
    assert count[~likely].sum() == 0
    assert scipy.stats.chisquare(count[likely], n * expected[likely]).pvalue > 1e-3


# ---- whole completions, with all that depends on what was said before

TABLE = np.float32([[0.3, 1.1, -0.4, 0.8, -1.0], [-0.2, 0.5, 1.3, -0.6, 0.4], [1.0, -0.9, 0.2, 0.7, 0.1],
                    [0.0, 0.6, -0.3, -1.1, 0.9], [0.5, 0.5, 0.5, 0.5, 0.5]])  # fmt: skip
PROMPT, LAST = (4, 1, 1), 4
EVERYTHING = {
    "temperature": 1.0, "top_k": 5, "top_p": 1.0, "min_p": 0.0, "allowed": np.ones(5, bool), "min_length": 0,
    "repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0,
}  # fmt: skip
EACH = {
    "temperature": 0.6, "top_k": 3, "top_p": 0.7, "min_p": 0.3, "allowed": np.array([1, 1, 0, 1, 1], bool),
    "min_length": 2, "repetition_penalty": 1.8, "frequency_penalty": 0.9, "presence_penalty": -0.8,
}  # fmt: skip
PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
TOGETHER = [
    (), *((name,) for name in EACH), ("temperature", "top_k", "top_p", "min_p"), PENALTIES, ("top_p", *PENALTIES),
    ("min_length", "allowed", "top_k"), tuple(EACH),
]  # fmt: skip


def next_token(said, how):
    """Probabilities [5] in float64 after a prompt and some tokens; every option read off its definition."""
    row = [float(x) for x in TABLE[[*PROMPT, *said][-1]]]
    for v in range(5):
        if v in said or v in PROMPT:
            row[v] *= how["repetition_penalty"] if row[v] < 0 else 1 / how["repetition_penalty"]
        row[v] -= said.count(v) * how["frequency_penalty"] + (v in said) * how["presence_penalty"]
        if not how["allowed"][v] or (v == LAST and len(said) < how["min_length"]):
            row[v] = -np.inf
    return by_the_definition(row, *(how[name] for name in ("temperature", "top_k", "top_p", "min_p")))


def every_completion(how, length, said=()):
    """Of at most so many tokens, each with its probability."""
    if len(said) == length or said[-1:] == (LAST,):
        return {said: 1.0}
    p = next_token(said, how)
    return {more: p[v] * q for v in range(5) if p[v] for more, q in every_completion(how, length, (*said, v)).items()}


@jax.jit
def hundred_thousand(how):
    """Completions of at most three tokens from a table of bigrams: one program for all settings."""
    return sample(
        {}, np.array([PROMPT]), np.ones((1, 3), bool), jax.random.key(11), length=3, group=100_000, pad_token=0,
        apply=lambda params, tokens, seen, cache: (jnp.asarray(TABLE)[tokens], cache),
        init_cache=lambda rows, length: jnp.zeros((rows, 0)), end_tokens=(LAST,), how=how,
    )  # fmt: skip


@pytest.mark.parametrize("names", TOGETHER, ids="+".join)
def test_completions_come_as_often_as_their_probability_says(names):
    how = EVERYTHING | {name: EACH[name] for name in names}
    expected = every_completion(how, 3)
    assert abs(sum(expected.values()) - 1) < 1e-9
    out = jax.device_get(hundred_thousand(Sampling(**how, end_tokens=jnp.array([LAST]))))
    rows, first, count = np.unique(np.where(out.alive, out.tokens, -1), axis=0, return_index=True, return_counts=True)
    said = [tuple(int(x) for x in row if x >= 0) for row in rows]
    assert set(said) <= set(expected)
    logps = out.logps[first].sum(1)
    np.testing.assert_allclose(logps, np.log([expected[x] for x in said]), atol=1e-5)
    counted = dict(zip(said, count.tolist()))
    observed, shares = np.array([counted.get(x, 0) for x in expected]), np.array(list(expected.values()))
    often = shares * 100_000 >= 5
    assert often.sum() > 3 and shares[often].sum() > 0.999
    fair = shares[often] / shares[often].sum() * observed[often].sum()
    assert scipy.stats.chisquare(observed[often], fair).pvalue > 1e-3


def test_every_row_has_a_number_of_its_own():
    """One number for all rows would draw every row's token at the same height of the cumulative distribution."""
    uniform = jnp.zeros((500, 10))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 500), uniform))
    assert len(set(drawn.tolist())) == 10
    np.testing.assert_array_equal(draw(jax.random.split(jax.random.key(0), 500), uniform), drawn)


EXTREMES = [0.0, 2.0**-24, 2.0**-23, 0.5, 1 - 2.0**-23, 1 - 2.0**-24]  # uniform() gives [0, 1) in steps of 2^-23


def set_uniform(monkeypatch, values):
    """Row i has values[i] for its uniform number, through the key that it is handed."""
    table = jnp.asarray(values, jnp.float32)
    monkeypatch.setattr(distribution.jax.random, "uniform", lambda key, *a, **k: table[key])
    return jnp.arange(len(values))


@pytest.mark.parametrize("seed", range(3))
def test_at_the_extremes_nothing_impossible_is_drawn(monkeypatch, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, (len(EXTREMES), 50)).astype(np.float32)
    logits[rng.random(logits.shape) < 0.6] = -np.inf
    logits[:, [0, 1, -2, -1]] = -np.inf
    drawn = np.asarray(draw(set_uniform(monkeypatch, EXTREMES), jnp.asarray(logits)))
    assert (drawn >= 0).all() and (drawn < 50).all()
    assert np.isfinite(np.take_along_axis(logits, drawn[:, None], 1)).all()
    assert drawn[0] == np.flatnonzero(np.isfinite(logits[0]))[0]


@pytest.mark.parametrize("only", [0, 4, 8])
def test_a_token_that_has_everything_is_drawn_always(monkeypatch, only):
    keys = set_uniform(monkeypatch, EXTREMES)
    logits = np.where(np.arange(V) == only, 1.0, -np.inf)[None].repeat(len(EXTREMES), 0)
    np.testing.assert_array_equal(draw(keys, jnp.asarray(logits, jnp.float32)), only)


def test_rounding_does_not_draw_what_was_cut_off(monkeypatch):
    """A parallel cumulative sum rounds every entry on a way of its own: over many tokens it rises, and falls,
    where nothing was added. A mark in such a step must not draw the token there: its log-probability is -inf."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, 3000).astype(np.float32)
    logits[rng.random(3000) < 0.5] = -np.inf
    # every place where it could happen
    marks = np.unique(np.asarray(jnp.cumsum(jax.nn.softmax(jnp.asarray(logits)))))
    marks = np.concatenate([marks, np.nextafter(marks, np.float32(0))])
    marks = marks[marks < 1]
    drawn = np.asarray(draw(set_uniform(monkeypatch, marks), jnp.tile(logits, (len(marks), 1))))
    assert np.isfinite(logits[drawn]).all()
