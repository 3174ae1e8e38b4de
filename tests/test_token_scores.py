"""Scores from hidden states in chunks: the numbers of the whole logits, without their memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax import logps

B, T, D, V = 3, 7, 4, 11
RNG = np.random.default_rng(0)
HIDDEN, UNEMBED = RNG.normal(size=(B, T, D)), 2 * RNG.normal(size=(V, D))
TOKENS = RNG.integers(0, V, (B, T))
RAISED = {"temperature": 0.7, "softcap": 3.0, "scale": 1.5}


def by_the_equation(hidden, unembed, temperature=1.0, softcap=None, scale=1.0):
    """In float64, a token at a time: logps, entropies, log sum p^2, mean logit, hit."""
    out = np.zeros((5, B, T))
    for b in range(B):
        for t in range(1, T):
            z = scale * unembed @ hidden[b, t - 1]
            z = (z if softcap is None else softcap * np.tanh(z / softcap)) / temperature
            logp = z - z.max() - np.log(np.exp(z - z.max()).sum())
            p = np.exp(logp)
            hit = float(np.argmax(z) == TOKENS[b, t])
            out[:, b, t] = logp[TOKENS[b, t]], -(p * logp).sum(), np.log((p * p).sum()), z.mean(), hit
    return out


@functools.partial(jax.jit, static_argnames="chunk")
def program(hidden, unembed, tokens, numbers, chunk):
    return logps.token_scores(hidden, unembed, tokens, **numbers, chunk=chunk)


@pytest.mark.parametrize("numbers", [{}, {"temperature": 0.5}, RAISED], ids=str)
def test_the_scores_are_the_equations(numbers):
    got = program(np.float32(HIDDEN), np.float32(UNEMBED), TOKENS, numbers, 2)
    expected = by_the_equation(np.float32(HIDDEN), np.float32(UNEMBED), **numbers)
    for name, x, y in zip(got._fields, got, expected):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5, err_msg=name)


def test_they_are_those_of_the_whole_logits():
    hidden, unembed = np.float32(HIDDEN), np.float32(UNEMBED)
    got, logits = program(hidden, unembed, TOKENS, {}, 3), jnp.asarray(hidden @ unembed.T)
    np.testing.assert_allclose(got.logps, logps.token_logps(logits, TOKENS), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.entropies, logps.token_entropies(logits), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got.hits, logps.top_1_hits(logits, TOKENS))


@pytest.mark.parametrize("chunk", [1, 4, 6, 100])
def test_the_size_of_a_chunk_changes_nothing(chunk):
    expected = program(np.float32(HIDDEN), np.float32(UNEMBED), TOKENS, RAISED, 3)
    got = program(np.float32(HIDDEN), np.float32(UNEMBED), TOKENS, RAISED, chunk)
    for x, y in zip(got, expected):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_gradients_are_slopes(slope):
    """In float64, of everything that has one, in the hidden states, the unembedding and the temperature."""
    coefficients = RNG.normal(size=(4, B, T))

    def total(hidden, unembed, temperature, score):
        numbers = RAISED | {"temperature": temperature}
        return sum((c * x).sum() for c, x in zip(coefficients, score(hidden, unembed, **numbers)))

    chunked = lambda hidden, unembed, **numbers: logps.token_scores(hidden, unembed, TOKENS, **numbers, chunk=2)
    with jax.enable_x64(True):
        got = jax.grad(lambda *x: total(*x, chunked), (0, 1, 2))(jnp.asarray(HIDDEN), jnp.asarray(UNEMBED), 0.7)
    assert got[0].dtype == np.float64
    of = lambda x, y, t: total(x, y, t, by_the_equation)
    np.testing.assert_allclose(got[0], slope(lambda x: of(x, UNEMBED, 0.7), HIDDEN), atol=1e-6)
    np.testing.assert_allclose(got[1], slope(lambda x: of(HIDDEN, x, 0.7), UNEMBED), atol=1e-6)
    np.testing.assert_allclose(got[2], slope(lambda t: of(HIDDEN, UNEMBED, float(t)), np.float64(0.7)), atol=1e-6)


def test_the_last_hidden_state_and_the_first_token_are_not_looked_at():
    hidden, tokens = HIDDEN.astype(np.float32), TOKENS.copy()
    expected = program(hidden, np.float32(UNEMBED), tokens, {}, 2)
    hidden[:, -1], tokens[:, 0] = np.nan, -5
    total = lambda h: sum(x.sum() for x in program(h, np.float32(UNEMBED), tokens, {}, 2))
    for x, y in zip(program(hidden, np.float32(UNEMBED), tokens, {}, 2), expected):
        np.testing.assert_array_equal(x, y)
    gradient = np.asarray(jax.grad(total)(hidden))
    assert np.isfinite(gradient).all() and (gradient[:, -1] == 0).all() and (gradient[:, :-1] != 0).any()


def test_logits_are_never_formed_whole_forwards_or_backwards():
    """B T = 512 rows of 8192 logits are 16 MiB a copy; the plain version keeps several."""
    S, rows, columns, vocab, width = jax.ShapeDtypeStruct, 4, 128, 8192, 32
    shapes = S((rows, columns, width), jnp.float32), S((vocab, width), jnp.float32), S((rows, columns), jnp.int32)

    def plain(hidden, unembed, tokens):
        logits = jnp.einsum("btd,vd->btv", hidden, unembed)
        return (logps.token_logps(logits, tokens) + logps.token_entropies(logits)).sum()

    def chunked(hidden, unembed, tokens):
        scores = logps.token_scores(hidden, unembed, tokens, chunk=4)
        return (scores.logps + scores.entropies).sum()

    def temporary(fn):
        return jax.jit(jax.value_and_grad(fn, (0, 1))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporary(plain) > 2 * rows * columns * vocab * 4
    assert temporary(chunked) < 0.1 * temporary(plain)


def test_gradients_of_a_bfloat16_model_are_summed_in_float32():
    """256 equal contributions of 1 + 2^-7 to one row of the unembedding: in bfloat16 the sum would stop growing."""
    hidden = jnp.full((1, 257, 1), 1 + 2.0**-7, jnp.bfloat16)
    tokens = jnp.zeros((1, 257), jnp.int32)
    total = lambda w: logps.token_scores(hidden, w, tokens, chunk=1).logps.sum()
    gradient = jax.grad(total)(jnp.zeros((2, 1), jnp.float32))
    np.testing.assert_allclose(gradient[:, 0], np.array([0.5, -0.5]) * 256 * (1 + 2.0**-7), rtol=1e-5)


def test_numbers_may_be_traced_and_are_one_program():
    traces = []

    @jax.jit
    def score(numbers):
        traces.append(1)
        return logps.token_scores(np.float32(HIDDEN), np.float32(UNEMBED), TOKENS, **numbers, chunk=3).logps

    for temperature in (0.5, 0.7):
        got = score({"temperature": temperature, "softcap": 2.0, "scale": 3.0})
        expected = by_the_equation(HIDDEN, UNEMBED, temperature, 2.0, 3.0)[0]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": HIDDEN[0]}, r"hidden has shape \(7, 4\), expected \[B, T, D\]"),
        ({"unembed": UNEMBED.T}, r"unembed has shape \(4, 11\), expected \[V, D\] with D=4 \(from hidden\)"),
        ({"tokens": TOKENS[:, 1:]}, r"tokens has shape \(3, 6\), expected \[B, T\] with T=7"),
        ({"hidden": np.ones((B, T, D), int)}, "hidden must be of a float type"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": np.nan}, "temperature must be above 0"),
        ({"softcap": -1.0}, "softcap must be above 0"),
        ({"scale": 0.0}, "scale must be above 0"),
        ({"chunk": 0}, "chunk must be above 0"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    good = {"hidden": np.float32(HIDDEN), "unembed": np.float32(UNEMBED), "tokens": TOKENS}
    with pytest.raises(ValueError, match=message):
        logps.token_scores(**good | change)


def test_over_columns_takes_trees_and_keeps_columns_apart():
    x, y = np.float32(HIDDEN), np.float32(TOKENS)
    for chunk in (1, 3, 7, 50):
        out = logps.over_columns(lambda a, b: {"sum": a.sum(-1) + b, "both": (a, b)}, x, y, chunk=chunk)
        np.testing.assert_allclose(out["sum"], x.sum(-1) + y, rtol=1e-5)
        np.testing.assert_array_equal(out["both"][0], x)
