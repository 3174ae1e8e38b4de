import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from objective_batches import ADVANTAGES, BATCH, MASK, batches, compiled, far, rows_of, together

from pt_jax import weights
from pt_jax.objectives import clipped, sequence, soft

WIDE = {"clip_low": 0.3, "clip_high": 0.5}
OF_A_ROW = [sequence.gspo, sequence.gmpo, sequence.rloo]
FAST = {fn.__name__: compiled(fn) for fn in [*OF_A_ROW, sequence.gspo_token]}


def clip(ratio, a, clip_low, clip_high):
    """-min(ratio a, clip(ratio) a), and its slope in log(ratio)."""
    bounded = min(max(ratio, 1 - clip_low), 1 + clip_high)
    gone = (a < 0 and ratio < 1 - clip_low) or (a > 0 and ratio > 1 + clip_high)
    return -min(ratio * a, bounded * a), 0 if gone else -ratio * a


def gspo_by_the_equation(log_ratio, a, **bounds):
    """A row's loss a token, and the slopes of their sum in the row's logps."""
    loss, slope = clip(np.exp(log_ratio.mean()), a[0], **bounds)
    return np.full(len(a), loss), np.full(len(a), slope)  # slope / |y|, from each of the |y| tokens


def rloo_by_the_equation(log_ratio, a, **bounds):
    loss, slope = clip(np.exp(log_ratio.sum()), a[0], **bounds)
    return np.full(len(a), loss), np.full(len(a), slope * len(a))


def gspo_token_by_the_equation(log_ratio, a, **bounds):
    s = np.exp(log_ratio.mean())
    return np.array([clip(s, x, **bounds) for x in a]).T


def gmpo_by_the_equation(log_ratio, a, clip_low, clip_high):
    u = np.minimum(log_ratio, clip_high) if a[0] >= 0 else np.maximum(log_ratio, -clip_low)
    loss = -np.exp(u.mean()) * a[0]
    return np.full(len(a), loss), np.where(u == log_ratio, loss, 0)


BY_THE_EQUATION = {
    "gspo": gspo_by_the_equation,
    "gspo_token": gspo_token_by_the_equation,
    "gmpo": gmpo_by_the_equation,
    "rloo": rloo_by_the_equation,
}


def assert_the_equation(name, batch, bounds):
    loss, slope = (np.zeros(batch[3].shape) for _ in range(2))
    for i, t, log_ratio, a in rows_of(*batch):
        loss[i, t], slope[i, t] = BY_THE_EQUATION[name](log_ratio, a, **bounds)
    got_loss, got_slope = FAST[name](*batch, **bounds)
    assert got_loss.dtype == got_slope.dtype == jnp.float32
    np.testing.assert_allclose(got_loss, loss, rtol=1e-4, atol=1e-30)
    np.testing.assert_allclose(got_slope, slope, rtol=1e-4, atol=1e-30)


def off_the_bounds(batch, of_tokens):
    """On a bound itself the slope is a matter of the last digit."""
    for _, _, log_ratio, _ in rows_of(*batch):
        for x in np.r_[log_ratio if of_tokens else [], log_ratio.mean(), log_ratio.sum()]:
            edges = (WIDE["clip_high"], -WIDE["clip_low"]) if of_tokens else np.log([0.7, 1.5])
            if np.min(np.abs(x - np.array(edges))) < 1e-5:
                return False
    return True


@pytest.mark.parametrize("name", ["gspo", "gmpo", "rloo"])
@given(batch=batches(a_row=True))
def test_the_equation_holds_for_any_ratio_advantage_and_length(name, batch):
    if off_the_bounds(batch, name == "gmpo"):
        assert_the_equation(name, batch, WIDE)


@given(batch=batches())
def test_the_equation_of_gspo_token_holds_for_advantages_a_token(batch):
    if off_the_bounds(batch, False):
        assert_the_equation("gspo_token", batch, WIDE)


@pytest.mark.parametrize("name", [*BY_THE_EQUATION])
@pytest.mark.parametrize("bounds", [{"clip_low": 3e-4, "clip_high": 4e-4}, {"clip_low": 0.4, "clip_high": 0.4}])
def test_the_published_numbers(name, bounds):
    assert_the_equation(name, BATCH, bounds)


def test_the_defaults_are_the_papers():
    same = lambda a, b: np.testing.assert_array_equal(a(*BATCH), b)
    same(sequence.gspo, sequence.gspo(*BATCH, clip_low=3e-4, clip_high=4e-4))
    same(sequence.gspo_token, sequence.gspo_token(*BATCH, clip_low=3e-4, clip_high=4e-4))
    same(sequence.gmpo, sequence.gmpo(*BATCH, clip_low=0.4, clip_high=0.4))


@pytest.mark.parametrize("fn", OF_A_ROW)
def test_the_gradient_is_the_slope_of_the_loss(fn, slope):
    of_rows = BY_THE_EQUATION[fn.__name__]

    def total(x):
        clean = (np.where(MASK, y, 0) for y in BATCH[1:3])
        return sum(of_rows(log_ratio, a, **WIDE)[0].sum() for _, _, log_ratio, a in rows_of(x, *clean, MASK))

    expected = slope(total, np.where(MASK, BATCH[0], 0))
    np.testing.assert_allclose(FAST[fn.__name__](*BATCH, **WIDE)[1], expected, rtol=1e-4, atol=1e-5)


def test_the_log_ratio_of_an_answer_is_the_mean_over_its_scored_tokens():
    got = sequence.sequence_log_ratio(*BATCH[:2], MASK)
    means = [np.log([0.3, 3.0, 1.1]).mean(), 0, np.log([0.5, 0.9, 1.25, 2.0, 1.3]).mean()]
    np.testing.assert_allclose(got, np.where(MASK, np.array(means)[:, None], 0), rtol=1e-5)


@pytest.mark.parametrize("fn", OF_A_ROW)
def test_the_mean_over_sequences_is_the_papers_mean_over_answers(fn):
    of_rows = [BY_THE_EQUATION[fn.__name__](r, a, **WIDE)[0][0] for _, _, r, a in rows_of(*BATCH)]
    got = weights.weighted_sum(fn(*BATCH, **WIDE), weights.sequence_mean(MASK))
    np.testing.assert_allclose(got, np.mean(of_rows), rtol=1e-5)  # of the two rows that have tokens


def test_luspo_is_gspo_that_counts_an_answer_by_its_length():
    of_rows = [gspo_by_the_equation(r, a, **WIDE)[0][0] * len(a) for _, _, r, a in rows_of(*BATCH)]
    got = weights.weighted_sum(sequence.gspo(*BATCH, **WIDE), weights.constant_length(MASK, length=1))
    np.testing.assert_allclose(got, np.mean(of_rows), rtol=1e-5)


def mean_slopes(fn, batch, weigh=weights.sequence_mean, **bounds):
    return jax.grad(lambda x: weights.weighted_sum(fn(x, *batch[1:], **bounds), weigh(batch[3])))(batch[0])


def test_gspo_token_is_gspo_where_a_row_has_one_advantage():
    np.testing.assert_allclose(sequence.gspo_token(*BATCH, **WIDE), sequence.gspo(*BATCH, **WIDE), rtol=1e-6)
    of_token, of_row = (mean_slopes(fn, BATCH, **WIDE) for fn in (sequence.gspo_token, sequence.gspo))
    np.testing.assert_allclose(of_token, of_row, rtol=1e-5, atol=1e-9)
    assert (np.asarray(of_row)[MASK] != 0).any()


def test_gspo_token_gives_each_token_the_gradient_of_its_own_advantage():
    """A stop-gradient that is forgotten would mix the advantages of the row."""
    logps, old_logps, _, mask = together(2.0, 1.0)
    advantages = np.float32([[1.0, 0.0]])
    gradient = FAST["gspo_token"](logps, old_logps, advantages, mask, clip_high=9.0, clip_low=0.5)[1]
    np.testing.assert_allclose(gradient, [[-2, 0]], rtol=1e-6)
    gradient = FAST["gspo"](logps, old_logps, advantages, mask, clip_high=9.0, clip_low=0.5)[1]
    np.testing.assert_allclose(gradient, [[-1, -1]], rtol=1e-6)


@pytest.mark.parametrize("fn", [sequence.gspo, sequence.gspo_token, sequence.rloo])
def test_an_answer_of_one_token_is_ppos(fn):
    one = tuple(x[:, :1] for x in BATCH)
    np.testing.assert_allclose(fn(*one, **WIDE), clipped.clipped_surrogate(*one, **WIDE), rtol=1e-6)
    np.testing.assert_allclose(
        mean_slopes(fn, one, **WIDE), mean_slopes(clipped.clipped_surrogate, one, **WIDE), rtol=1e-6
    )


@pytest.mark.parametrize("name", [*BY_THE_EQUATION])
def test_the_clip_has_four_corners(name):
    """Each sign of the advantage with a ratio below and above the interval. Two tokens of one ratio, so the geometric
    mean is that ratio; the product, RLOO's, its square."""
    of = {"clip_low": 0.2, "clip_high": 0.2}
    ratios, bound = (0.5, 0.9, 1.1, 2.0), {"low": 0.8, "high": 1.2}
    if name == "gmpo":
        bound = {"low": np.exp(-0.2), "high": np.exp(0.2)}
    if name == "rloo":
        ratios = tuple(np.sqrt(ratios))
    got = [[FAST[name](*together(r, a), **of) for r in ratios] for a in (1.0, -1.0)]
    losses = np.array([[float(loss[0, 0]) for loss, _ in row] for row in got])
    gone = np.array([[not slope.any() for _, slope in row] for row in got])
    np.testing.assert_allclose(losses, [[-0.5, -0.9, -1.1, -bound["high"]], [bound["low"], 0.9, 1.1, 2.0]], rtol=1e-5)
    np.testing.assert_array_equal(gone, [[False, False, False, True], [True, False, False, False]])


def test_gmpo_clips_each_token_before_the_mean():
    """Ratios 4 and 1 with bound log 2: the square root of 2 x 1, not min(the square root of 4, 2)."""
    logps = np.log(np.float32([[4.0, 1.0]]))
    batch = logps, np.zeros_like(logps), np.ones_like(logps), np.ones((1, 2), bool)
    loss, slope = FAST["gmpo"](*batch, clip_low=0.4, clip_high=np.log(2.0))
    np.testing.assert_allclose(loss, [[-np.sqrt(2)] * 2], rtol=1e-6)
    np.testing.assert_allclose(slope, [[0, -np.sqrt(2)]], rtol=1e-6)


def test_without_bounds_gmpo_is_gspo():
    far_bounds = {"clip_low": 50.0, "clip_high": 50.0}
    of_gspo = {"clip_low": 1 - 1e-12, "clip_high": 1e12}
    np.testing.assert_allclose(sequence.gmpo(*BATCH, **far_bounds), sequence.gspo(*BATCH, **of_gspo), rtol=1e-5)


@pytest.mark.parametrize("name", [*BY_THE_EQUATION])
def test_on_the_policy_that_sampled_all_are_policy_gradients(name):
    """Ratio exactly 1, nothing clipped even by the narrowest interval; RLOO's counts an answer as one action."""
    batch = BATCH[1], BATCH[1], BATCH[2], MASK
    fn = getattr(sequence, name)
    np.testing.assert_array_equal(fn(*batch), np.where(MASK, -ADVANTAGES, 0).astype(np.float32))
    of = {"rloo": lambda mask: weights.constant_length(mask, length=1)}.get(name, weights.sequence_mean)
    reinforce = lambda x, _, *rest: soft.reinforce(x, *rest)
    np.testing.assert_allclose(mean_slopes(fn, batch), mean_slopes(reinforce, batch, of), rtol=1e-5)


@pytest.mark.parametrize("gap", [50.0, -50.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("name", ["gspo", "gspo_token", "gmpo"])
def test_a_ratio_far_away_has_finite_loss_and_gradient(name, gap, advantage):
    loss, slope = FAST[name](*far(gap, advantage), **WIDE)
    assert np.isfinite(loss).all() and np.isfinite(slope).all()
    assert (slope == 0).all() == ((gap > 0) == (advantage > 0))  # what is not rewarded is not clipped


@pytest.mark.parametrize("gap", [500.0, -500.0])
def test_the_clip_of_whole_answers_holds_where_their_ratio_overflows(gap):
    loss, slope = FAST["rloo"](*far(gap, np.sign(gap)), **WIDE)
    np.testing.assert_allclose(loss, [[-1.5 if gap > 0 else 0.7] * 2], rtol=1e-6)
    np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("fn", [*OF_A_ROW, sequence.gspo_token])
def test_a_bound_out_of_range_is_refused(fn):
    for name in ("clip_low", "clip_high"):
        with pytest.raises(ValueError, match=rf"{name} must be in \[0.0, .*\), got -0.1"):
            fn(*BATCH, **{name: -0.1})
