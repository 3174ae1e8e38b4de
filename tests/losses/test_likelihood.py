import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from pt_jax import weights
from pt_jax.losses import likelihood

MASK = np.array([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 0, 1, 0]], bool)
LOGPS = np.where(MASK, -np.linspace(0.1, 5, 15).reshape(3, 5), np.nan).astype(np.float32)
LOGPS[1] = 1e9


class NllTest(parameterized.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_the_equation(self):
        got = self.variant(likelihood.nll)(LOGPS, MASK)
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, np.where(MASK, -LOGPS, 0))

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_its_gradient_is_minus_one_where_scored_and_zero_elsewhere(self):
        slopes = self.variant(jax.grad(lambda x, mask: likelihood.nll(x, mask).sum()))(LOGPS, MASK)
        np.testing.assert_array_equal(slopes, -MASK.astype(np.float32))


class DftTest(parameterized.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_the_equation(self):
        got = self.variant(likelihood.dft)(LOGPS, MASK)
        assert got.dtype == jnp.float32
        x = np.where(MASK, LOGPS, 0).astype(np.float64)
        np.testing.assert_allclose(got, np.where(MASK, -np.exp(x) * x, 0), rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_its_gradient_is_the_probability(self):
        """Not that of -p log p, which is -p (1 + log p): the factor is held constant."""
        slopes = self.variant(jax.grad(lambda x, mask: likelihood.dft(x, mask).sum()))(LOGPS, MASK)
        np.testing.assert_allclose(slopes, np.where(MASK, -np.exp(np.where(MASK, LOGPS, 0)), 0), rtol=1e-5)


def test_dft_of_an_impossible_token_is_nothing_and_pulls_at_nothing():
    value, slopes = jax.value_and_grad(lambda x: likelihood.dft(x, np.ones((1, 2), bool)).sum())(
        jnp.array([[0.0, -jnp.inf]])
    )
    assert value == 0
    np.testing.assert_array_equal(slopes, [[-1, 0]])


def test_a_prompt_in_the_mask_is_another_loss():
    """Pre-training scores it, fine-tuning does not; nothing but the mask tells them apart."""
    logps, everything = np.full((1, 4), -2.0, np.float32), np.ones((1, 4), bool)
    response = np.array([[False, False, True, True]])
    assert likelihood.nll(logps, everything).sum() == 8
    assert likelihood.nll(logps, response).sum() == 4


def test_a_certain_token_costs_nothing_and_an_impossible_one_everything():
    got = likelihood.nll(jnp.array([[0.0, -jnp.inf]]), jnp.ones((1, 2), bool))
    np.testing.assert_array_equal(got, [[0, np.inf]])


def test_a_wrong_shape_is_told():
    with pytest.raises(ValueError, match=r"mask has shape \(5, 3\), expected \[B, T\] with B=3 \(from logps\)"):
        likelihood.nll(LOGPS, MASK.T)


def test_trl_computes_the_same_loss_and_gradient(trl):
    case = trl("sft/nll/num_items_None")
    mask = case.inputs.label_mask
    mean = lambda x: weights.weighted_sum(likelihood.nll(x, mask), weights.token_mean(mask))
    loss, slopes = jax.value_and_grad(mean)(case.inputs.per_token_logps)
    np.testing.assert_allclose(loss, case.outputs.loss, rtol=1e-5)
    # TRL is handed zeros where nothing is scored and sums them too, so its slope there means nothing
    np.testing.assert_allclose(slopes[mask], case.outputs.grad_logps[mask], rtol=1e-5)
    np.testing.assert_array_equal(slopes[~mask], 0)
