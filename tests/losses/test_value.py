import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pt_jax.losses import value

MASK = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1]], bool)


def by_the_equation(values, old_values, returns, mask, clip):
    """Loss, slope in the value, and whether the clip took the slope away: element by element, in float64."""
    loss, slope, away = (np.zeros(mask.shape) for _ in range(3))
    for i in zip(*np.nonzero(mask)):
        v, old, r = (np.float64(x[i]) for x in (values, old_values, returns))
        near = min(max(v, old - clip), old + clip)
        away[i] = (near - r) ** 2 > (v - r) ** 2
        loss[i] = max((v - r) ** 2, (near - r) ** 2) / 2
        slope[i] = 0 if away[i] else v - r
    return loss, slope, away


CLIPPED, FREE = jax.jit(value.clipped_value_loss), jax.jit(value.value_loss)
INDICATOR = jax.jit(value.value_clip_indicator)
SLOPES = jax.jit(jax.grad(lambda *x, clip: value.clipped_value_loss(*x, clip=clip).sum(), (0, 1, 2)))


@given(st.data())
def test_the_equation_and_its_gradient_hold_for_any_values(data):
    number = st.floats(-3, 3, width=16)
    arrays = np.array(data.draw(st.lists(number, min_size=36, max_size=36)), np.float32).reshape(3, 3, 4)
    clip = data.draw(st.sampled_from([0.2, 0.5, 1.5]))
    values, old, _ = arrays
    # on the bound itself, and where both errors are one, the slope is a matter of the last digit
    mask = MASK & (np.abs(np.abs(values - old) - clip) > 1e-3)
    loss, slope, away = by_the_equation(*arrays, mask, clip)
    rubbish = data.draw(st.sampled_from([np.nan, np.inf, 1e9]))
    poisoned = [np.where(mask, x, rubbish).astype(np.float32) for x in arrays]
    np.testing.assert_allclose(CLIPPED(*poisoned, mask, clip=clip), loss, rtol=1e-4, atol=1e-6)
    tie = (
        mask & (np.abs(loss - np.where(mask, (values - arrays[2]) ** 2 / 2, 0)) < 1e-5) & (np.abs(values - old) > clip)
    )
    np.testing.assert_array_equal(np.asarray(INDICATOR(*poisoned, mask, clip=clip))[~tie], away[~tie])
    got = SLOPES(*poisoned, mask, clip=clip)
    free = mask & (np.abs(values - old) <= clip)
    np.testing.assert_allclose(np.asarray(got[0])[free], slope[free], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.asarray(got[0])[~tie], slope[~tie], rtol=1e-4, atol=1e-6)
    for other in got[1:]:  # neither the old value nor the target learns
        np.testing.assert_array_equal(other, 0)


def test_the_gradient_is_the_slope_of_the_loss(slope):
    values, old, returns = np.random.default_rng(0).normal(size=(3, *MASK.shape))
    expected = slope(lambda v: by_the_equation(v, old, returns, MASK, 0.3)[0].sum(), values)
    with jax.enable_x64(True):
        got = SLOPES(*(np.where(MASK, x, np.nan) for x in (values, old, returns)), MASK, clip=0.3)[0]
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8)


def test_the_clip_has_four_corners():
    """Moved up or down by more than the clip, with the return above or below: towards it there is no more to gain."""
    old, returns = np.zeros((1, 4), np.float32), np.float32([[2.0, -2.0, 2.0, -2.0]])
    values, mask = np.float32([[1.0, 1.0, -1.0, -1.0]]), np.ones((1, 4), bool)
    np.testing.assert_allclose(CLIPPED(values, old, returns, mask, clip=0.5), [[1.125, 4.5, 4.5, 1.125]])
    np.testing.assert_allclose(SLOPES(values, old, returns, mask, clip=0.5)[0], [[0, 3, -3, 0]])
    np.testing.assert_array_equal(INDICATOR(values, old, returns, mask, clip=0.5), [[1, 0, 0, 1]])


@pytest.mark.parametrize("clip", [1e6, 0.2])
def test_on_the_first_update_nothing_is_clipped(clip):
    values, returns = np.random.default_rng(1).normal(size=(2, *MASK.shape)).astype(np.float32)
    np.testing.assert_array_equal(CLIPPED(values, values, returns, MASK, clip=clip), FREE(values, returns, MASK))
    np.testing.assert_array_equal(INDICATOR(values, values, returns, MASK, clip=clip), 0)
    expected = np.where(MASK, values - returns, 0)
    np.testing.assert_allclose(SLOPES(values, values, returns, MASK, clip=clip)[0], expected, rtol=1e-6)


def test_the_worse_of_two_is_never_less_than_one():
    arrays = np.random.default_rng(2).normal(size=(3, *MASK.shape)).astype(np.float32)
    values, _, returns = arrays
    assert (np.asarray(CLIPPED(*arrays, MASK, clip=0.1)) >= np.asarray(FREE(values, returns, MASK))).all()


@pytest.mark.parametrize("clip", [0.0, -0.2, np.nan])
def test_a_clip_that_is_not_positive_is_refused(clip):
    one = np.ones((1, 1), np.float32)
    for fn in (value.clipped_value_loss, value.value_clip_indicator):
        with pytest.raises(ValueError, match="clip must be above 0"):
            fn(one, one, one, one == 1, clip=clip)
