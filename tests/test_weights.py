"""Which mean is taken: every rule against its equation, and against the ways in which means have gone wrong."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st

from pt_jax import weights

# Ragged rows with holes, one of them without any scored token: no two rules agree on it.
MASK = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]], bool)
RULES = {
    "token_mean": weights.token_mean,
    "sequence_mean": weights.sequence_mean,
    "constant_length": functools.partial(weights.constant_length, length=7),
}
RULE = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def by_the_equation(name, mask):
    """The weights in float64, element by element."""
    w, rows = np.zeros(mask.shape), max(sum(r.any() for r in mask), 1)
    for i, t in zip(*np.nonzero(mask)):
        w[i, t] = {
            "token_mean": 1 / mask.sum(),
            "sequence_mean": 1 / mask[i].sum() / rows,
            "constant_length": 1 / 7 / rows,
        }[name]
    return w


class WeightsTest(parameterized.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    @parameterized.parameters(*RULES)
    def test_the_equation(self, name):
        got = self.variant(RULES[name])(MASK)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, by_the_equation(name, MASK), rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_row_mean_counts_the_rows_that_are_real(self):
        got = self.variant(weights.row_mean)(np.array([True, False, True, True]))
        np.testing.assert_allclose(got, [1 / 3, 0, 1 / 3, 1 / 3], rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_what_weighs_nothing_is_not_summed(self):
        x = np.where(MASK, np.arange(15.0, dtype=np.float32).reshape(3, 5), np.nan)
        x[1] = [1e9, -1e9, np.inf, -np.inf, np.nan]
        w = by_the_equation("sequence_mean", MASK).astype(np.float32)
        got = self.variant(weights.weighted_sum)(x, w)
        np.testing.assert_allclose(got, ((0 + 1 + 3) / 3 + 11) / 2, rtol=1e-6)


@given(st.data())
@pytest.mark.parametrize("name", RULES)
def test_the_equation_holds_for_any_mask(name, data):
    shape = data.draw(st.sampled_from([(1, 1), (2, 7), (3, 5)]))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])))
    mask = mask.reshape(shape)
    got = np.asarray(RULES[name](mask))
    np.testing.assert_allclose(got, by_the_equation(name, mask), rtol=1e-6)
    if name != "constant_length":
        np.testing.assert_allclose(got.sum(), float(mask.any()), atol=1e-6)


@RULE
def test_nothing_scored_weighs_nothing(rule):
    np.testing.assert_array_equal(rule(np.zeros((3, 5), bool)), 0)


def test_no_rows_weigh_nothing():
    np.testing.assert_array_equal(weights.row_mean(np.zeros(3, bool)), 0)


@RULE
def test_padding_changes_nothing(rule):
    padded = np.pad(MASK, ((1, 2), (3, 4)))
    got = np.asarray(rule(padded))
    np.testing.assert_array_equal(got[1:-2, 3:-4], rule(MASK))
    assert got[~padded].sum() == 0


@RULE
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_repeating_the_batch_changes_no_mean(rule, rows):
    """A stray 1 / B passes every test with one row or with equal rows; it fails this."""
    mask = MASK[::-1][:rows]
    x = np.arange(15, dtype=np.float32).reshape(3, 5)[:rows] ** 2
    mean = lambda k: weights.weighted_sum(np.tile(x, (k, 1)), rule(np.tile(mask, (k, 1))))
    np.testing.assert_allclose(mean(8), mean(1), rtol=1e-6)


def test_constant_length_scales_with_its_length_and_nothing_else():
    np.testing.assert_allclose(
        weights.constant_length(MASK, length=14) * 2, weights.constant_length(MASK, length=7), rtol=1e-6
    )


@pytest.mark.parametrize("length", [0, -1, float("nan")])
def test_a_length_that_is_not_positive_is_refused(length):
    with pytest.raises(ValueError, match="length must be above 0"):
        weights.constant_length(MASK, length=length)


@pytest.mark.parametrize("rule", [*RULES.values(), weights.row_mean])
def test_a_mask_of_other_axes_is_refused(rule):
    with pytest.raises(ValueError, match=r"has shape \(2, 3, 4\), expected \[B"):
        rule(np.zeros((2, 3, 4), bool))


def test_the_gradient_of_a_weighted_sum_is_the_weights():
    w = jnp.asarray(by_the_equation("sequence_mean", MASK), jnp.float32)
    x = jnp.where(MASK, 2.5, jnp.nan).at[1].set(1e9)
    np.testing.assert_array_equal(jax.grad(weights.weighted_sum)(x, w), w)


def test_a_negative_weight_counts():
    assert weights.weighted_sum(jnp.array([3.0, 5.0]), jnp.array([-1.0, 1.0])) == 2


def test_a_sum_of_bfloat16_is_taken_in_float32():
    """In bfloat16, 256 + 1 is 256."""
    got = weights.weighted_sum(jnp.array([256, 1, 1, 1], jnp.bfloat16), jnp.ones(4, jnp.float32))
    assert got == 259
    assert got.dtype == jnp.float32


def test_weights_are_not_broadcast():
    with pytest.raises(ValueError, match=r"weights has shape \(1, 5\), expected that of x, \(3, 5\)"):
        weights.weighted_sum(np.zeros((3, 5)), np.zeros((1, 5)))


@pytest.mark.parametrize("rubbish", [np.nan, np.inf, 1e9])
def test_what_is_not_scored_is_zero_in_value_and_gradient(rubbish):
    mask = np.array([True, False])
    x, y = jnp.array([2.0, rubbish]), jnp.array([rubbish, -1.0])
    np.testing.assert_array_equal(weights.zero_unscored(mask, x, y[::-1])[0], [2, 0])
    np.testing.assert_array_equal(weights.zero_unscored(mask, x, y[::-1])[1], [-1, 0])
    square = lambda x: jnp.sum(weights.zero_unscored(mask, x)[0] ** 2)
    np.testing.assert_array_equal(jax.grad(square)(x), [4, 0])
