import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st
from objective_batches import batches, compiled, far

from pt_jax import divergences, weights
from pt_jax.objectives import clipped

MASK = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
RATIOS = np.array([[0.3, 3.0, 7.0, 1.1, 7.0], [9.0] * 5, [0.5, 0.9, 1.25, 2.0, 1.0]])
ADVANTAGES = np.array([[0.7] * 5, [5.0] * 5, [-1.3, 0.35, -0.35, 0.0, 2.0]])
OLD_LOGPS = -np.linspace(0.1, 6, 15).reshape(3, 5)


def poisoned(x, rubbish):
    return np.where(MASK, x, rubbish).astype(np.float32)


BATCH = (
    poisoned(OLD_LOGPS + np.log(RATIOS), np.nan),
    poisoned(OLD_LOGPS, 1e9),
    poisoned(ADVANTAGES, np.nan),
    MASK,
)


def by_the_equation(logps, old_logps, advantages, mask, clip_low=0.2, clip_high=0.2):
    """Loss, d loss / d logps, and which bound took the gradient away: element by element, in float64."""
    loss, slope, low, high = (np.zeros(mask.shape) for _ in range(4))
    for i in zip(*np.nonzero(mask)):
        r, a = np.exp(np.float64(logps[i]) - np.float64(old_logps[i])), np.float64(advantages[i])
        bounded = min(max(r, 1 - clip_low), 1 + clip_high)
        loss[i] = -min(r * a, bounded * a)
        low[i], high[i] = a < 0 and r < 1 - clip_low, a > 0 and r > 1 + clip_high
        slope[i] = 0 if low[i] or high[i] else -r * a
    return loss, slope, low, high


def slopes(logps, old_logps, advantages, mask, **bounds):
    return jax.grad(lambda x: clipped.clipped_surrogate(x, old_logps, advantages, mask, **bounds).sum())(logps)


class ClippedTest(parameterized.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    @parameterized.parameters((0.2, 0.28), (0.45, 2.5))
    def test_the_equation(self, clip_low, clip_high):
        bounds = {"clip_low": clip_low, "clip_high": clip_high}
        got = self.variant(clipped.clipped_surrogate)(*BATCH, **bounds)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, by_the_equation(*BATCH, **bounds)[0], rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    @parameterized.parameters((0.2, 0.28), (0.45, 2.5))
    def test_the_gradient_of_the_equation(self, clip_low, clip_high):
        bounds = {"clip_low": clip_low, "clip_high": clip_high}
        got = self.variant(slopes)(*BATCH, **bounds)
        np.testing.assert_allclose(got, by_the_equation(*BATCH, **bounds)[1], rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    @parameterized.parameters((0.2, 0.28), (0.45, 2.5))
    def test_the_indicators_of_the_equation(self, clip_low, clip_high):
        bounds = {"clip_low": clip_low, "clip_high": clip_high}
        low, high = self.variant(clipped.clip_indicators)(*BATCH, **bounds)
        np.testing.assert_array_equal(low, by_the_equation(*BATCH, **bounds)[2])
        np.testing.assert_array_equal(high, by_the_equation(*BATCH, **bounds)[3])

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_the_four_corners(self):
        """Each sign of the advantage with a ratio below and above the interval; a clip turned inside out, which
        nothing shows as long as the ratio is 1, fails here."""
        ratio = np.array([0.5, 0.9, 1.1, 2.0])
        logps = np.log(np.stack([ratio, ratio])).astype(np.float32)
        old_logps, advantages = np.zeros_like(logps), np.repeat(np.float32([[1], [-1]]), 4, axis=1)
        batch = logps, old_logps, advantages, np.ones((2, 4), bool)
        loss = self.variant(clipped.clipped_surrogate)(*batch)
        np.testing.assert_allclose(loss, [[-0.5, -0.9, -1.1, -1.2], [0.8, 0.9, 1.1, 2.0]], rtol=1e-6)
        gradient = self.variant(slopes)(*batch)
        np.testing.assert_allclose(gradient, [[-0.5, -0.9, -1.1, 0], [0, 0.9, 1.1, 2.0]], rtol=1e-6)


FAST = jax.jit(lambda *x: (clipped.clipped_surrogate(*x), slopes(*x), *clipped.clip_indicators(*x)))


@given(st.data())
def test_the_equation_holds_for_any_ratio_advantage_and_length(data):
    rows, columns = data.draw(st.sampled_from([(1, 1), (3, 5), (2, 8)]))
    row = lambda x: st.lists(st.lists(x, min_size=columns, max_size=columns), min_size=rows, max_size=rows)
    lengths = data.draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows))
    mask = np.arange(columns) < np.array(lengths)[:, None]
    old_logps = np.array(data.draw(row(st.floats(-20, 0))), np.float32)
    logps = (old_logps + np.log(np.array(data.draw(row(st.floats(0.1, 10)))))).astype(np.float32)
    ratio = np.exp(logps.astype(np.float64) - old_logps)
    # on the bound itself the slope is a matter of the last digit
    mask &= (np.abs(ratio - 0.8) > 1e-5) & (np.abs(ratio - 1.2) > 1e-5)
    # XLA takes subnormal numbers for 0
    advantage = st.one_of(st.floats(-3, 3, width=32, allow_subnormal=False), st.sampled_from([0.0, 0.35]))
    advantages = np.array(data.draw(row(advantage)), np.float32)
    for got, expected in zip(
        FAST(logps, old_logps, advantages, mask), by_the_equation(logps, old_logps, advantages, mask)
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-30)


def test_the_gradient_is_the_slope_of_the_loss(slope):
    logps, old_logps, advantages, _ = (np.where(MASK, x, 0) for x in BATCH)
    expected = slope(lambda x: by_the_equation(x, old_logps, advantages, MASK)[0].sum(), logps)
    np.testing.assert_allclose(slopes(*BATCH), expected, rtol=1e-4, atol=1e-6)


def test_on_the_policy_that_sampled_it_is_plain_policy_gradient():
    """The first update after sampling: ratio exactly 1, nothing clipped, gradient -A log p."""
    batch = BATCH[1], BATCH[1], BATCH[2], MASK
    advantages = np.where(MASK, ADVANTAGES, 0).astype(np.float32)
    np.testing.assert_array_equal(clipped.clipped_surrogate(*batch), -advantages)
    np.testing.assert_array_equal(slopes(*batch), -advantages)
    for indicator in clipped.clip_indicators(*batch):
        np.testing.assert_array_equal(indicator, 0)


def test_the_indicators_are_where_the_gradient_is_gone():
    low, high = clipped.clip_indicators(*BATCH)
    gone = MASK & (ADVANTAGES != 0) & (np.asarray(slopes(*BATCH)) == 0)
    np.testing.assert_array_equal(np.asarray(low + high, bool), gone)
    assert gone.any()


def test_clip_higher_moves_the_upper_bound_alone():
    """DAPO: at a ratio of 1.25, 0.28 lets the token earn on; the lower bound stays 0.8."""
    x = np.log(np.array([[1.25, 0.75, 0.75]], np.float32))
    batch = x, np.zeros_like(x), np.array([[1, -1, 1]], np.float32), np.ones((1, 3), bool)
    np.testing.assert_allclose(clipped.clipped_surrogate(*batch, clip_high=0.28), [[-1.25, 0.8, -0.75]], rtol=1e-6)
    np.testing.assert_allclose(clipped.clipped_surrogate(*batch, clip_low=0.28), [[-1.2, 0.75, -0.75]], rtol=1e-6)


@pytest.mark.parametrize("gap", [50.0, -50.0])
def test_a_ratio_far_away_has_finite_loss_and_gradient(gap):
    x = np.full((1, 2), gap, np.float32)
    batch = x, np.zeros_like(x), np.array([[1, -1]], np.float32), np.ones((1, 2), bool)
    assert np.isfinite(clipped.clipped_surrogate(*batch)).all()
    np.testing.assert_allclose(slopes(*batch), by_the_equation(*batch)[1], rtol=1e-4)


def test_a_ratio_of_two_probabilities_that_round_to_zero_is_still_a_ratio():
    """exp(-200) is 0 in float32; the quotient of the two must be taken before the exponential."""
    x = np.full((1, 2), -200, np.float32)
    batch = x + np.log(np.float32([[1.1, 2.0]])), x, np.ones((1, 2), np.float32), np.ones((1, 2), bool)
    np.testing.assert_allclose(clipped.clipped_surrogate(*batch), [[-1.1, -1.2]], rtol=1e-4)
    np.testing.assert_allclose(slopes(*batch), [[-1.1, 0]], rtol=1e-4)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"clip_low": 1.0}, r"clip_low must be in \[0.0, 1.0\), got 1.0"),
        ({"clip_low": -0.1}, r"clip_low must be in \[0.0, 1.0\), got -0.1"),
        ({"clip_high": -0.1}, r"clip_high must be in \[0.0, inf\), got -0.1"),
    ],
)
def test_a_bound_out_of_range_is_refused(bounds, message):
    with pytest.raises(ValueError, match=message):
        clipped.clipped_surrogate(*BATCH, **bounds)


@pytest.mark.parametrize("fn", [clipped.clipped_surrogate, clipped.clip_indicators])
def test_one_advantage_a_row_is_not_broadcast_in_silence(fn):
    with pytest.raises(ValueError, match=r"advantages has shape \(3, 1\), expected \[B, T\] with T=5"):
        fn(BATCH[0], BATCH[1], BATCH[2][:, :1], MASK)
    with pytest.raises(ValueError, match=r"old_logps has shape \(3, 4\)"):
        fn(BATCH[0], BATCH[1][:, 1:], BATCH[2], MASK)


WEIGHTS = {
    "grpo": lambda mask, options: weights.sequence_mean(mask),
    "dapo": lambda mask, options: weights.token_mean(mask),
    "dr_grpo": lambda mask, options: weights.constant_length(mask, length=options.max_completion_length),
}


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "grpo_eps0.05", "dapo_clip_higher",
                                  "grpo_beta0.1_nobias", "dapo_beta0.1_nobias"])  # fmt: skip
def test_trl_computes_the_same_loss_gradient_and_clip_ratios(trl, name):
    case = trl(f"grpo/{name}")
    options, inputs = case.options, case.inputs
    mask = inputs.completion_mask.astype(bool)
    batch = inputs.old_per_token_logps, np.repeat(inputs.advantages[:, None], mask.shape[1], axis=1), mask
    bounds = {"clip_low": options.epsilon, "clip_high": options.epsilon_high or options.epsilon}

    @jax.jit
    @jax.value_and_grad
    def mean(x):
        loss = clipped.clipped_surrogate(x, *batch, **bounds)
        if options.beta:
            loss += options.beta * divergences.k3(x, inputs.ref_per_token_logps, mask)
        return weights.weighted_sum(loss, WEIGHTS[options.loss_type](mask, options))

    loss, gradient = mean(inputs.per_token_logps)
    np.testing.assert_allclose(loss, case.outputs.loss, rtol=1e-5)
    np.testing.assert_allclose(gradient, case.outputs.grad_logps, rtol=1e-5, atol=1e-8)
    token_mean = lambda x: weights.weighted_sum(x, weights.token_mean(mask))
    low, high = clipped.clip_indicators(inputs.per_token_logps, *batch, **bounds)
    np.testing.assert_allclose(token_mean(low), case.metrics["clip_ratio/low_mean"], rtol=1e-5)
    np.testing.assert_allclose(token_mean(high), case.metrics["clip_ratio/high_mean"], rtol=1e-5)
    if options.beta:
        kl = divergences.k3(inputs.per_token_logps, inputs.ref_per_token_logps, mask)
        np.testing.assert_allclose(token_mean(kl), case.metrics["kl"], rtol=1e-5)


# ---- dual clip


def dual_by_the_equation(logps, old_logps, advantages, mask, clip_low, clip_high, clip_dual):
    loss, slope, _, _ = by_the_equation(logps, old_logps, advantages, mask, clip_low, clip_high)
    for i in zip(*np.nonzero(mask)):
        least = (1 + clip_dual) * np.float64(advantages[i])
        if advantages[i] < 0 and -loss[i] < least:
            loss[i], slope[i] = -least, 0
    return loss, slope


DUAL = {"clip_low": 0.2, "clip_high": 0.3, "clip_dual": 1.5}
FAST_DUAL = compiled(clipped.dual_clip)


@given(batches())
def test_the_equation_of_the_dual_clip(batch):
    logps, old_logps, mask = batch[0], batch[1], batch[3]
    ratio = np.exp(np.where(mask, logps, 0) - np.where(mask, old_logps, 0.0))
    if all(np.abs(ratio - bound).min() > 1e-5 for bound in (0.8, 1.3, 2.5)):
        for got, expected in zip(FAST_DUAL(*batch, **DUAL), dual_by_the_equation(*batch, **DUAL)):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-30)


def test_the_dual_clip_has_one_corner_more():
    ratio = np.array([0.5, 0.9, 1.1, 2.0, 9.0])
    logps = np.log(np.stack([ratio, ratio])).astype(np.float32)
    advantages = np.repeat(np.float32([[1], [-1]]), 5, axis=1)
    loss, slope = FAST_DUAL(logps, np.zeros_like(logps), advantages, np.ones((2, 5), bool), clip_dual=2.0)
    np.testing.assert_allclose(loss, [[-0.5, -0.9, -1.1, -1.2, -1.2], [0.8, 0.9, 1.1, 2.0, 3.0]], rtol=1e-6)
    np.testing.assert_allclose(slope, [[-0.5, -0.9, -1.1, 0, 0], [0, 0.9, 1.1, 2.0, 0]], rtol=1e-6)


def test_the_dual_bound_is_for_negative_advantages_alone():
    good = (*BATCH[:2], np.abs(BATCH[2]), MASK)
    np.testing.assert_array_equal(clipped.dual_clip(*good, clip_dual=0.25), clipped.clipped_surrogate(*good))
    far_off = clipped.dual_clip(*BATCH, clip_dual=1e9)
    np.testing.assert_array_equal(far_off, clipped.clipped_surrogate(*BATCH))


def test_intellects_two_sided_clipping_is_the_dual_clip():
    """-min(min(ratio, delta) A, clip(ratio) A), as they write it."""
    ratio, a, delta = np.where(MASK, RATIOS, 1), np.where(MASK, ADVANTAGES, 0), 1.7
    expected = -np.minimum(np.minimum(ratio, delta) * a, np.clip(ratio, 0.8, 1.3) * a)
    got = clipped.dual_clip(*BATCH, clip_low=0.2, clip_high=0.3, clip_dual=delta - 1)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("gap", [50.0, -50.0, 200.0])
def test_a_ratio_far_away_cannot_pass_the_dual_clip(gap):
    loss, slope = FAST_DUAL(*far(gap, -1.0), **DUAL)
    np.testing.assert_allclose(loss, [[2.5 if gap > 0 else 0.8] * 2], rtol=1e-6)
    np.testing.assert_array_equal(slope, 0)
