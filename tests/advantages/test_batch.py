import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pt_jax import advantages

nan = np.nan


def batch_normalised(rewards, ddof, epsilon):
    return (rewards - np.nanmean(rewards, 1, keepdims=True)) / (np.nanstd(rewards, ddof=ddof) + epsilon)


def leave_one_out_normalised(rewards, ddof, epsilon):
    n = (~np.isnan(rewards)).sum(1, keepdims=True)
    a = rewards - (np.nansum(rewards, 1, keepdims=True) - rewards) / np.where(n > 1, n - 1, nan)
    return (a - np.nanmean(a)) / (np.nanstd(a, ddof=ddof) + epsilon)


def reinforce_plus_plus_baseline(rewards, ddof, epsilon):
    a = rewards - np.nanmean(rewards, 1, keepdims=True)
    return (a - np.nanmean(a)) / (np.nanstd(a, ddof=ddof) + epsilon)


OF_GROUPS = pytest.mark.parametrize(
    ("fn", "by_the_equation"),
    [
        (jax.jit(advantages.batch_normalised), batch_normalised),
        (jax.jit(advantages.leave_one_out_normalised), leave_one_out_normalised),
        (jax.jit(advantages.reinforce_plus_plus_baseline), reinforce_plus_plus_baseline),
    ],
    ids=["batch_normalised", "leave_one_out_normalised", "reinforce_plus_plus_baseline"],
)


@OF_GROUPS
@given(st.data())
def test_the_equation_holds_for_any_rewards(fn, by_the_equation, data):
    reward = st.one_of(st.floats(-10, 10, width=16), st.sampled_from([0.0, 1.0, 0.35]))
    rewards = np.array(data.draw(st.lists(reward, min_size=12, max_size=12)), np.float32).reshape(3, 4)
    rewards[0, 0] = data.draw(st.sampled_from([nan, 0.35]))
    rewards[1, :3] = data.draw(st.sampled_from([nan, 0.35]))
    numbers = {"ddof": data.draw(st.sampled_from([0.0, 1.0])), "epsilon": data.draw(st.sampled_from([1e-2, 0.5]))}
    expected = np.nan_to_num(by_the_equation(rewards.astype(np.float64), **numbers))
    np.testing.assert_allclose(fn(rewards, **numbers), expected, rtol=1e-4, atol=1e-5)


def test_they_are_normalised_once():
    rewards = np.array([[0.35, 1.0, nan, 0.4], [9.0, 7.5, 8.0, 8.0]], np.float32)
    for fn in (advantages.leave_one_out_normalised, advantages.reinforce_plus_plus_baseline):
        once = np.asarray(fn(rewards))[~np.isnan(rewards)]
        np.testing.assert_allclose([once.mean(), once.std(ddof=1)], [0, 1], atol=1e-3)


def test_the_difficulty_of_prompts_is_in_one_spread_and_not_in_the_other():
    """Groups apart by 100 with a deviation of 1 inside."""
    rewards = np.array([[0.0, 2.0], [100.0, 102.0]], np.float32)
    np.testing.assert_allclose(advantages.reinforce_plus_plus_baseline(rewards, ddof=0), [[-1, 1], [-1, 1]], rtol=1e-5)
    spread = np.sqrt(50**2 + 1)
    got = advantages.batch_normalised(rewards, ddof=0)
    np.testing.assert_allclose(got, np.array([[-1, 1], [-1, 1]]) / spread, rtol=1e-4)


# ---- tokens

MASK = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1]], bool)
WHITEN, KEEPING = jax.jit(advantages.whiten), jax.jit(advantages.whiten_keeping_mean)


@given(st.data())
def test_whitening_is_over_the_scored_tokens(data):
    x = np.array(data.draw(st.lists(st.floats(-50, 50, width=16), min_size=12, max_size=12)), np.float32).reshape(3, 4)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=12, max_size=12))).reshape(3, 4)
    mask[0, :2] = True
    ddof, epsilon = data.draw(st.sampled_from([0.0, 1.0])), data.draw(st.sampled_from([1e-2, 0.5]))
    kept = x[mask].astype(np.float64)
    whitened = (x - kept.mean()) / np.sqrt(kept.var(ddof=ddof) + epsilon)
    poisoned = np.where(mask, x, data.draw(st.sampled_from([nan, np.inf, 1e9]))).astype(np.float32)
    got = WHITEN(poisoned, mask, ddof=ddof, epsilon=epsilon)
    np.testing.assert_allclose(got, np.where(mask, whitened, 0), rtol=1e-4, atol=1e-4)
    got = KEEPING(poisoned, mask, ddof=ddof, epsilon=epsilon)
    np.testing.assert_allclose(got, np.where(mask, whitened + kept.mean(), 0), rtol=1e-4, atol=1e-4)


def test_the_variance_is_unbiased_unless_told_otherwise():
    x, mask = np.array([[1.0, 2.0, 3.0, nan]], np.float32), np.array([[1, 1, 1, 0]], bool)
    np.testing.assert_allclose(advantages.whiten(x, mask), [[-1, 0, 1, 0]], atol=1e-6)
    np.testing.assert_allclose(advantages.whiten(x, mask, ddof=0), [[-np.sqrt(1.5), 0, np.sqrt(1.5), 0]], atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
@pytest.mark.parametrize("x", [0.35, -0.1, 1e6])
def test_equal_tokens_whiten_to_exactly_zero(n, x):
    """Also one token alone, whose unbiased variance is 0 / 0."""
    row, mask = np.full((1, 1000), x, np.float32), np.arange(1000)[None] < n
    np.testing.assert_array_equal(WHITEN(row, mask), 0)
    np.testing.assert_allclose(KEEPING(row, mask), np.where(mask, np.float32(x), 0), rtol=1e-5)


def test_nothing_scored_whitens_to_zero():
    nothing = np.zeros((2, 3), bool)
    for fn in (WHITEN, KEEPING):
        np.testing.assert_array_equal(fn(np.full((2, 3), nan, np.float32), nothing), 0)


def test_a_nan_that_is_scored_takes_only_itself_out():
    x = np.array([[1.0, nan, 3.0, 7.0]], np.float32)
    got = WHITEN(x, np.ones((1, 4), bool))
    np.testing.assert_array_equal(got, WHITEN(x, np.array([[1, 0, 1, 1]], bool)))
    np.testing.assert_array_equal(got[0, 1], 0)


def test_whitened_once_is_whitened_for_good():
    x = np.random.default_rng(0).normal(3, 5, MASK.shape).astype(np.float32)
    once = np.asarray(WHITEN(x, MASK))
    np.testing.assert_allclose([once[MASK].mean(), once[MASK].var(ddof=1)], [0, 1], atol=1e-6)
    np.testing.assert_allclose(WHITEN(once, MASK), once, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_whitening_is_its_slope(slope):
    x, w = np.random.default_rng(1).normal(size=(2, *MASK.shape))

    def by_the_equation(x):
        kept = x[MASK]
        return (w[MASK] * (kept - kept.mean()) / np.sqrt(kept.var(ddof=1) + 1e-8)).sum()

    with jax.enable_x64(True):
        got = jax.jit(jax.grad(lambda x: (w * advantages.whiten(x, MASK)).sum()))(np.where(MASK, x, nan))
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, slope(by_the_equation, x), rtol=1e-5, atol=1e-9)


@given(st.data())
def test_reinforce_plus_plus_whitens_what_is_still_to_be_earned(data):
    r = np.array(data.draw(st.lists(st.floats(-5, 5, width=16), min_size=12, max_size=12)), np.float32).reshape(3, 4)
    to_go = np.zeros((3, 4))
    for i in range(3):
        after = 0.0
        for t in reversed(range(4)):
            if MASK[i, t]:
                after = to_go[i, t] = r[i, t] + 0.9 * after
    kept = to_go[MASK]
    expected = np.where(MASK, (to_go - kept.mean()) / np.sqrt(kept.var(ddof=1) + 0.01), 0)
    got = REINFORCE(np.where(MASK, r, nan).astype(np.float32), MASK, gamma=0.9, epsilon=0.01)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


REINFORCE = jax.jit(advantages.reinforce_plus_plus)
