import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pt_jax import advantages

nan = np.nan
SUMMED, GDPO = jax.jit(advantages.summed_rewards), jax.jit(advantages.per_reward_normalised)


def drawn(data):
    term = st.one_of(st.floats(-10, 10, width=16), st.sampled_from([0.0, 1.0, 0.35, nan]))
    terms = np.array(data.draw(st.lists(term, min_size=24, max_size=24)), np.float32).reshape(3, 4, 2)
    weights = np.array(data.draw(st.lists(st.floats(-2, 2, width=16), min_size=2, max_size=2)), np.float32)
    return terms, weights


@given(st.data())
def test_what_has_no_verdict_adds_nothing_and_what_has_none_at_all_stays_without(data):
    terms, weights = drawn(data)
    expected = np.nansum(terms.astype(np.float64) * weights, -1)
    expected[np.isnan(terms).all(-1)] = nan
    np.testing.assert_allclose(SUMMED(terms, weights), expected, rtol=1e-5, atol=1e-5)


def gdpo(terms, weights, epsilon):
    """Function after function and group after group, in float64; ddof 1."""
    total = np.full(terms.shape[:2], nan)
    for f, p in np.ndindex(terms.shape[2], terms.shape[0]):
        group = terms[p, :, f].astype(np.float64)
        there = ~np.isnan(group)
        if there.any():
            deviation = group[there].std(ddof=1) if there.sum() > 1 else 0
            relative = (group[there] - group[there].mean()) / (deviation + epsilon)
            total[p, there] = np.nan_to_num(total[p, there]) + weights[f] * relative
    there = ~np.isnan(total)
    out = np.zeros(total.shape)
    if there.any():
        deviation = total[there].std(ddof=1) if there.sum() > 1 else 0
        out[there] = (total[there] - total[there].mean()) / (deviation + epsilon)
    return out


@given(st.data())
def test_each_reward_is_normalised_before_the_sum_and_the_sum_after_it(data):
    terms, weights = drawn(data)
    got = GDPO(terms, weights, epsilon=0.01)
    np.testing.assert_allclose(got, gdpo(terms, weights, 0.01), rtol=1e-3, atol=1e-3)


def test_a_reward_of_small_spread_does_not_vanish():
    """A hundredth of one reward is as good as the whole of it; in a sum that is normalised later it is nearly 0."""
    terms = np.array([[[0, 1], [1, 0], [0, 0], [1, 1]], [[1, 1], [0, 0], [1, 1], [0, 0]]], np.float32)
    one = np.asarray(GDPO(terms, np.ones(2, np.float32), epsilon=1e-6))
    small = np.asarray(GDPO(terms * np.array([1, 1e-2], np.float32), np.ones(2, np.float32), epsilon=1e-6))
    np.testing.assert_allclose(small, one, atol=1e-3)
    summed = advantages.group_relative(SUMMED(terms * np.array([1, 1e-2], np.float32), np.ones(2, np.float32)))
    assert abs(summed[0, 0] - summed[0, 2]) < 0.05 < abs(one[0, 0] - one[0, 2])


def test_the_result_is_normalised_once():
    terms = np.random.default_rng(0).normal(size=(5, 4, 3)).astype(np.float32)
    got = np.asarray(GDPO(terms, np.array([1.0, 0.5, 2.0], np.float32)))
    np.testing.assert_allclose([got.mean(), got.std(ddof=1)], [0, 1], atol=1e-3)


def test_one_reward_function_is_the_relative_advantage_over_the_spread_of_the_batch():
    rewards = np.array([[0.0, 1.0, 0.0], [9.0, 9.5, nan]], np.float32)
    relative = advantages.group_relative_trl(rewards)
    got = GDPO(rewards[..., None], np.ones(1, np.float32))
    there = ~np.isnan(rewards)
    np.testing.assert_allclose(got, relative / (np.asarray(relative)[there].std(ddof=1) + 1e-4), rtol=1e-5, atol=1e-6)


def test_as_many_weights_as_functions_are_wanted():
    for fn in (advantages.summed_rewards, advantages.per_reward_normalised):
        with pytest.raises(ValueError, match=r"reward_weights has shape \(2,\), expected \[F\] with F=3"):
            fn(np.zeros((1, 4, 3)), np.ones(2))
