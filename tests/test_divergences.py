"""The table of ``divergences``, claim by claim, against exact enumeration over a small categorical."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st

from pt_jax import divergences

LOGITS = np.array([0.9, -1.3, 0.35, 2.0, -0.4])  # of the policy
REF_LOGITS = np.array([-0.2, 0.7, 0.35, 1.1, -2.0])
EVERY = np.ones((1, 5), bool)


def log_softmax(z):
    return z - np.log(np.exp(z).sum())


def kl(logits, ref_logits):
    """KL(policy || reference) and its gradient in the policy's logits: p_v (log p_v / q_v - KL)."""
    gap = log_softmax(logits) - log_softmax(ref_logits)
    p = np.exp(log_softmax(logits))
    return p @ gap, p * (gap - p @ gap)


def reverse_kl(logits, ref_logits):
    """KL(reference || policy) and its gradient in the policy's logits: p_v - q_v."""
    p, q = np.exp(log_softmax(logits)), np.exp(log_softmax(ref_logits))
    return q @ np.log(q / p), p - q


def mean_and_gradient(estimator, ref_logits=REF_LOGITS):
    """Over infinitely many tokens drawn from the policy, the draw itself being no part of the gradient.

    The row holds every token once, each weighted by how often the policy draws it.
    """
    drawn = np.exp(log_softmax(LOGITS))[None].astype(np.float32)
    ref_logps = log_softmax(ref_logits)[None].astype(np.float32)

    def mean(logits):
        return jnp.sum(drawn * estimator(jax.nn.log_softmax(logits)[None], ref_logps, EVERY))

    return jax.jit(jax.value_and_grad(mean))(jnp.asarray(LOGITS, jnp.float32))


def test_the_mean_of_k1_is_exactly_the_kl():
    np.testing.assert_allclose(mean_and_gradient(divergences.k1)[0], kl(LOGITS, REF_LOGITS)[0], rtol=1e-5)


def test_the_mean_of_k3_is_exactly_the_kl():
    np.testing.assert_allclose(mean_and_gradient(divergences.k3)[0], kl(LOGITS, REF_LOGITS)[0], rtol=1e-5)


def test_the_mean_of_k2_is_biased_and_less_so_near_the_reference():
    share = []
    for distance in (1.0, 0.1, 0.01):
        ref_logits = LOGITS + distance * (REF_LOGITS - LOGITS)
        exact = kl(LOGITS, ref_logits)[0]
        share.append(abs(mean_and_gradient(divergences.k2, ref_logits)[0] / exact - 1))
    assert share[0] > 0.1
    assert share[1] < share[0] / 5
    assert share[2] < 0.01


def test_the_gradient_of_k1_is_zero_on_average():
    """The classic: k1 put into the loss as a penalty is noise."""
    np.testing.assert_allclose(mean_and_gradient(divergences.k1)[1], 0, atol=1e-6)


def test_the_gradient_of_k1_does_not_know_the_reference():
    slopes = jax.grad(lambda x, ref: divergences.k1(x, ref, EVERY).sum())
    x = jnp.asarray(LOGITS[None], jnp.float32)
    np.testing.assert_array_equal(slopes(x, x + 1.0), slopes(x, x - 3.0))


def test_the_gradient_of_k2_is_that_of_the_kl():
    np.testing.assert_allclose(mean_and_gradient(divergences.k2)[1], kl(LOGITS, REF_LOGITS)[1], rtol=1e-4)


def test_the_gradient_of_k3_is_that_of_the_reverse_kl_and_not_of_the_kl():
    got = mean_and_gradient(divergences.k3)[1]
    np.testing.assert_allclose(got, reverse_kl(LOGITS, REF_LOGITS)[1], rtol=1e-4, atol=1e-6)
    assert np.abs(got - kl(LOGITS, REF_LOGITS)[1]).max() > 0.1


@pytest.mark.parametrize("estimator", [divergences.k2, divergences.k3])
def test_a_step_down_the_gradient_comes_nearer_to_the_reference(estimator):
    step = LOGITS - 0.1 * np.asarray(mean_and_gradient(estimator)[1], np.float64)
    assert kl(step, REF_LOGITS)[0] < kl(LOGITS, REF_LOGITS)[0]


def by_the_equation(name, logps, ref_logps, mask):
    out = np.zeros(mask.shape)
    for i in zip(*np.nonzero(mask)):
        r = np.exp(np.float64(ref_logps[i]) - np.float64(logps[i]))
        out[i] = {"k1": -np.log(r), "k2": np.log(r) ** 2 / 2, "k3": r - 1 - np.log(r)}[name]
    return out


class DivergencesTest(parameterized.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    @parameterized.parameters("k1", "k2", "k3")
    def test_the_equation(self, name):
        mask = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
        rng = np.random.default_rng(0)
        logps = np.where(mask, -rng.uniform(0.05, 3, mask.shape), np.nan).astype(np.float32)
        ref_logps = np.where(mask, logps + rng.uniform(np.log(0.3), np.log(3), mask.shape), 1e9).astype(np.float32)
        got = self.variant(getattr(divergences, name))(logps, ref_logps, mask)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, by_the_equation(name, logps, ref_logps, mask), rtol=1e-5, atol=1e-6)


@given(gaps=st.lists(st.floats(np.log(0.1), np.log(10)), min_size=6, max_size=6))
@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_the_equation_and_its_slope_hold_for_any_ratio(name, gaps):
    logps = np.linspace(-4, -0.1, 6, dtype=np.float32).reshape(2, 3)
    ref_logps = logps + np.array(gaps, np.float32).reshape(2, 3)
    mask = np.array([[True, True, False], [True, False, True]])
    fn = getattr(divergences, name)
    np.testing.assert_allclose(
        fn(logps, ref_logps, mask), by_the_equation(name, logps, ref_logps, mask), rtol=1e-4, atol=1e-6
    )
    log_r = ref_logps.astype(np.float64) - logps
    expected = np.where(mask, {"k1": 1 + 0 * log_r, "k2": -log_r, "k3": 1 - np.exp(log_r)}[name], 0)
    got = jax.grad(lambda x: fn(x, ref_logps, mask).sum())(logps)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


@given(st.lists(st.floats(-20, 20, width=32), min_size=6, max_size=6))
def test_k2_and_k3_are_never_negative(gaps):
    gaps = np.array([gaps], np.float32)
    for fn in (divergences.k2, divergences.k3):
        assert (fn(np.zeros_like(gaps), gaps, np.ones((1, 6), bool)) >= 0).all()


def test_k3_of_a_policy_close_by_does_not_round_to_zero():
    """exp(x) - 1 - x loses all digits at x = 1e-4 in float32; the answer is x^2 / 2."""
    got = divergences.k3(jnp.zeros((1, 1)), jnp.full((1, 1), 1e-3), EVERY[:, :1])
    np.testing.assert_allclose(got, 5e-7, rtol=1e-2)


@pytest.mark.parametrize("fn", [divergences.k1, divergences.k2, divergences.k3])
def test_a_wrong_shape_is_told(fn):
    with pytest.raises(ValueError, match=r"ref_logps has shape \(3, 4\), expected \[B, T\] with T=5"):
        fn(np.zeros((3, 5)), np.zeros((3, 4)), np.ones((3, 5), bool))
    with pytest.raises(ValueError, match=r"mask has shape \(5,\), expected \[B, T\]"):
        fn(np.zeros((3, 5)), np.zeros((3, 5)), np.ones(5, bool))
