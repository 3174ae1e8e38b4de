"""Log-probabilities stand on the token they speak of, and are right at the ends of what floats can hold."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st

from pt_jax import logps

B, T, V = 3, 5, 7
RNG = np.random.default_rng(0)
LOGITS = (3 * RNG.normal(size=(B, T, V))).astype(np.float32)
TOKENS = np.array([[0, 6, 0, 3, 3], [5, 5, 0, 1, 2], [6, 0, 4, 4, 0]])  # token 0 is a token like any other


def log_softmax(logits):
    z = np.asarray(logits, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def token_logps(logits, tokens):
    """Element by element: the row before a token scores it."""
    logp, out = log_softmax(logits), np.zeros(np.shape(tokens))
    for b, t in np.ndindex(out.shape):
        out[b, t] = logp[b, t - 1, tokens[b][t]] if t else 0
    return out


def token_entropies(logits):
    logp, out = log_softmax(logits), np.zeros(np.shape(logits)[:2])
    for b, t in np.ndindex(out.shape):
        out[b, t] = sum(-np.exp(x) * x for x in logp[b, t - 1] if np.isfinite(x)) if t else 0
    return out


class LogpsTest(parameterized.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    @parameterized.parameters(1.0, 1e3)
    def test_token_logps_are_the_equation(self, scale):
        got = self.variant(logps.token_logps)(LOGITS * np.float32(scale), TOKENS)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, token_logps(LOGITS * np.float32(scale), TOKENS), rtol=1e-5, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    @parameterized.parameters(1.0, 1e3)
    def test_token_entropies_are_the_equation(self, scale):
        got = self.variant(logps.token_entropies)(LOGITS * np.float32(scale))
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, token_entropies(LOGITS * np.float32(scale)), rtol=1e-5, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_top_1_hits_are_where_the_likeliest_token_came(self):
        likeliest = np.argmax(LOGITS, -1)
        tokens = TOKENS.copy()
        tokens[0, 1:], tokens[1, 2] = likeliest[0, :-1], likeliest[1, 1]
        got = self.variant(logps.top_1_hits)(LOGITS, tokens)
        expected = np.pad(likeliest[:, :-1] == tokens[:, 1:], ((0, 0), (1, 0)))
        assert expected[0, 1:].all() and expected[1, 2] and not expected.all()
        np.testing.assert_array_equal(got, expected.astype(np.float32))

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_sequence_logps_sum_what_is_scored(self):
        x = np.array([[-1.5, np.nan, -0.25], [1e9, np.nan, -np.inf], [-0.5, -0.125, -2.0]], np.float32)
        mask = np.array([[True, False, True], [False, False, False], [False, True, False]])
        np.testing.assert_array_equal(self.variant(logps.sequence_logps)(x, mask), [-1.75, 0, -0.125])


SCORE = jax.jit(lambda logits, tokens: (logps.token_logps(logits, tokens), logps.token_entropies(logits)))


@given(st.data())
def test_the_equations_hold_for_any_logits(data):
    shape = data.draw(st.sampled_from([(1, 1, 2), (2, 3, 4), (1, 6, 3)]))
    n = int(np.prod(shape))
    logits = np.array(data.draw(st.lists(st.floats(-60, 60, width=32), min_size=n, max_size=n)), np.float32)
    tokens = np.array(data.draw(st.lists(st.integers(0, shape[2] - 1), min_size=n, max_size=n)))
    logits, tokens = logits.reshape(shape), tokens.reshape(shape)[..., 0]
    scored, entropies = SCORE(logits, tokens)
    np.testing.assert_allclose(scored, token_logps(logits, tokens), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropies, token_entropies(logits), rtol=1e-4, atol=1e-5)


def moved(fn, logits, tokens, other_logits, other_tokens):
    """The slots [b, t] whose value is another one under the other arguments."""
    differ = np.asarray(fn(logits, tokens)) != np.asarray(fn(other_logits, other_tokens))
    return {(int(b), int(t)) for b, t in zip(*np.nonzero(differ))}


@pytest.mark.parametrize("fn", [logps.token_logps, lambda logits, _: logps.token_entropies(logits)])
def test_only_the_row_before_a_token_scores_it(fn):
    """Off by one in either direction passes tests of shapes, of sums and of repeated tokens; it fails this."""
    for row, expected in [(0, {(1, 1)}), (2, {(1, 3)}), (T - 1, set())]:
        changed = LOGITS.copy()
        changed[1, row] *= 0.5
        assert moved(fn, LOGITS, TOKENS, changed, TOKENS) == expected


def test_a_token_moves_its_own_slot_alone():
    for column, expected in [(0, set()), (1, {(2, 1)}), (T - 1, {(2, T - 1)})]:
        changed = TOKENS.copy()
        changed[2, column] = (changed[2, column] + 1) % V
        assert moved(logps.token_logps, LOGITS, TOKENS, LOGITS, changed) == expected


def test_what_is_added_to_all_logits_of_a_row_changes_nothing():
    up = LOGITS.astype(np.float64) + 100 * RNG.normal(size=(B, T, 1))
    np.testing.assert_allclose(logps.token_logps(up, TOKENS), logps.token_logps(LOGITS, TOKENS), atol=1e-4)


def test_far_logits_are_no_nan():
    far = jnp.array([[[1e9, 0.0, -1e9], [0.0, 0.0, 0.0]]])
    np.testing.assert_array_equal(logps.token_logps(far, np.array([[2, 0]])), [[0, 0]])
    np.testing.assert_array_equal(logps.token_logps(far, np.array([[2, 2]])), [[0, -2e9]])
    np.testing.assert_array_equal(logps.token_entropies(far), [[0, 0]])


def test_a_forbidden_token_has_no_part_in_value_or_gradient():
    """Sampling within top-k sets the other logits to -inf: 0 log 0 is 0, and so is its slope."""
    allowed = np.array([True, False, True, True, False, True, True])
    logits = jnp.where(allowed, LOGITS, -jnp.inf)
    tokens = np.full((B, T), 2)
    np.testing.assert_allclose(logps.token_entropies(logits), token_entropies(LOGITS[..., allowed]), rtol=1e-5)
    np.testing.assert_allclose(
        logps.token_logps(logits, tokens), token_logps(LOGITS[..., allowed], np.ones_like(tokens)), rtol=1e-5
    )
    slopes, alone = (
        jax.jit(jax.jacobian(lambda z: [fn.sum() for fn in SCORE(z, tokens)]))(z)
        for z in (logits, jnp.where(allowed, LOGITS, -1e9))
    )
    for got, expected in zip(slopes, alone):
        np.testing.assert_array_equal(got[..., ~allowed], 0)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fn", "oracle"),
    [
        (lambda z: logps.token_logps(z, TOKENS), lambda z: token_logps(z, TOKENS)),
        (logps.token_entropies, token_entropies),
    ],
    ids=["token_logps", "token_entropies"],
)
def test_the_gradient_is_that_of_the_equation(fn, oracle, slope):
    """Of a sum with uneven weights, because the slope of an even one hides a permutation of the slots."""
    w = np.linspace(-1, 2, B * T, dtype=np.float32).reshape(B, T)
    got = jax.jit(jax.grad(lambda z: jnp.sum(w * fn(z))))(LOGITS)
    np.testing.assert_allclose(got, slope(lambda z: np.sum(w * oracle(z)), LOGITS), rtol=1e-4, atol=1e-6)


def test_a_softmax_of_bfloat16_logits_is_taken_in_float32():
    low = jnp.asarray(LOGITS, jnp.bfloat16)
    exact = low.astype(jnp.float32)
    for fn in (lambda x: logps.token_logps(x, TOKENS), logps.token_entropies):
        assert fn(low).dtype == jnp.float32
        np.testing.assert_allclose(fn(low), fn(exact), rtol=1e-6)


def test_nothing_outside_the_mask_has_a_gradient():
    x = jnp.array([[-1.5, jnp.nan, -0.25], [1e9, jnp.nan, -jnp.inf]])
    mask = np.array([[True, False, True], [False, False, False]])
    np.testing.assert_array_equal(jax.grad(lambda x: logps.sequence_logps(x, mask).sum())(x), mask)


@pytest.mark.parametrize("fn", [logps.token_logps, logps.top_1_hits])
def test_tokens_of_another_length_are_refused(fn):
    with pytest.raises(ValueError, match=r"tokens has shape \(3, 4\), expected \[B, T\] with T=5 \(from logits\)"):
        fn(LOGITS, TOKENS[:, 1:])


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"mask has shape \(3, 4\), expected \[B, T\] with T=5 \(from logps\)"):
        logps.sequence_logps(LOGITS[..., 0], np.ones((3, 4), bool))


def test_an_entropy_is_not_the_surprise_of_the_token_that_came():
    """A metric named entropy that holds -log p goes unnoticed until the tokens are unlikely ones."""
    logits = jnp.log(jnp.array([[[0.9, 0.1], [0.5, 0.5]]]))
    expected = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    np.testing.assert_allclose(logps.token_entropies(logits), [[0, expected]], rtol=1e-6)
    np.testing.assert_allclose(logps.token_entropies(jnp.zeros((1, 2, V)))[0, 1], np.log(V), rtol=1e-6)


def test_trl_computes_the_same_logps(trl):
    case = trl("kernel/selective_log_softmax/T1.0")
    # TRL's function does not shift: a column more on the other side of each aligns them
    logits = np.pad(case.inputs.logits, ((0, 0), (0, 1), (0, 0)))
    tokens = np.pad(case.inputs.index, ((0, 0), (1, 0)))
    np.testing.assert_allclose(logps.token_logps(logits, tokens)[:, 1:], case.outputs.logps, rtol=1e-5)


def test_trl_computes_the_same_logps_entropies_hits_and_gradients(trl):
    case = trl("kernel/chunked_logprob/T1.0_capNone_scale1.0")
    tokens = np.pad(case.inputs.targets, (1, 0))[None]

    def total(hidden, weight):
        logits = jnp.pad(jnp.einsum("td,vd->tv", hidden, weight, precision="highest"), ((0, 1), (0, 0)))[None]
        scored, entropies = SCORE(logits, tokens)
        return scored.sum() + 0.3 * entropies.sum(), (scored, entropies, logps.top_1_hits(logits, tokens))

    arguments = case.inputs.hidden, case.inputs.weight
    grads, (scored, entropies, hits) = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(*arguments)
    np.testing.assert_allclose(scored[0, 1:], case.outputs.log_probs, rtol=1e-5)
    np.testing.assert_allclose(entropies[0, 1:], case.outputs.entropy, rtol=1e-5)
    np.testing.assert_array_equal(hits[0, 1:], case.outputs.is_top1)
    np.testing.assert_allclose(grads[0], case.outputs.grad_hidden, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grads[1], case.outputs.grad_weight, rtol=1e-5, atol=1e-6)


def test_a_sum_over_thousands_of_tokens_is_taken_in_float32():
    """2000 tokens of -1.37 in bfloat16 come to -2736, and one nat more or less does not show: the margin of a pair."""
    x, mask = jnp.full((1, 2000), -1.37, jnp.bfloat16), jnp.ones((1, 2000), bool)
    got = logps.sequence_logps(x, mask) - logps.sequence_logps(x.at[0, 0].add(-1), mask)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, 1, atol=2e-2)


def test_whole_numbers_are_refused():
    with pytest.raises(ValueError, match="logps must be of a float type"):
        logps.sequence_logps(np.zeros((2, 3), int), np.ones((2, 3), bool))
    with pytest.raises(ValueError, match="logits must be of a float type"):
        logps.top_1_hits(np.zeros((2, 3, 4), int), np.zeros((2, 3), int))
