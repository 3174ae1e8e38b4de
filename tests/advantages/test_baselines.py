import itertools
from math import comb

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pt_jax import advantages

nan = np.nan
reward = st.one_of(st.floats(-10, 10, width=16), st.sampled_from([0.0, 1.0, 0.35, nan]))


def drawn(data, p, g, of=reward):
    return np.array(data.draw(st.lists(of, min_size=p * g, max_size=p * g)), np.float32).reshape(p, g)


# ---- greedy


@given(st.data())
def test_a_greedy_answer_is_what_one_is_compared_with(data):
    rewards, greedy = drawn(data, 3, 4), drawn(data, 3, 1)[:, 0]
    expected = np.nan_to_num(rewards.astype(np.float64) - greedy[:, None])
    np.testing.assert_allclose(GREEDY(rewards, greedy), expected, rtol=1e-6)


GREEDY = jax.jit(advantages.greedy_baseline)


def test_one_sample_a_prompt_is_enough_for_a_greedy_baseline():
    np.testing.assert_array_equal(
        advantages.greedy_baseline(np.ones((3, 1)), np.array([0.0, 1.0, 2.0])), [[1], [0], [-1]]
    )


def test_each_prompt_has_one_greedy_answer():
    with pytest.raises(ValueError, match=r"greedy_rewards has shape \(3,\), expected \[P\] with P=2 \(from rewards\)"):
        advantages.greedy_baseline(np.ones((2, 3)), np.ones(3))


# ---- optimal


@given(st.data())
def test_the_optimal_baseline_is_the_mean_over_tokens(data):
    rewards = drawn(data, 3, 4)
    lengths = np.array(data.draw(st.lists(st.integers(1, 4000), min_size=12, max_size=12))).reshape(3, 4)
    expected = np.zeros((3, 4))
    for p in range(3):
        judged = ~np.isnan(rewards[p])
        tokens = np.repeat(rewards[p][judged].astype(np.float64), lengths[p][judged])
        expected[p, judged] = rewards[p][judged] - (tokens.mean() if judged.any() else 0)
    np.testing.assert_allclose(OPTIMAL(rewards, lengths), expected, rtol=1e-4, atol=1e-5)


OPTIMAL = jax.jit(advantages.optimal_baseline)


def test_answers_of_one_length_have_the_mean_as_their_optimal_baseline():
    rewards = np.array([[0.5, 0.25, 2.0, nan]], np.float32)
    got = advantages.optimal_baseline(rewards, np.full((1, 4), 7))
    np.testing.assert_allclose(got, advantages.group_centred(rewards), rtol=1e-6)


def test_the_optimal_baseline_has_the_least_variance_where_gradients_grow_with_length():
    """E[l (r - b)^2] over the answers, the variance that the gradients of l orthogonal tokens have, is least at b*."""
    rewards, lengths = np.array([[0.0, 1.0, 3.0]], np.float32), np.array([[9.0, 2.0, 4.0]])
    best = rewards - np.asarray(advantages.optimal_baseline(rewards, lengths))
    spread = lambda b: (lengths * (rewards - b) ** 2).sum()
    assert spread(best) < min(spread(best + 0.1), spread(best - 0.1), spread(rewards.mean()))


# ---- best of k


def by_enumeration(group, k):
    """Every set of k answers, its best one, and for each answer the mean over the sets that have it."""
    judged = [i for i, r in enumerate(group) if not np.isnan(r)]
    out = np.zeros(len(group))
    if len(judged) < k:
        return out
    sets = list(itertools.combinations(judged, k))
    best = np.array([max(group[i] for i in s) for s in sets], np.float64)
    if best.std() > 0:
        for i in judged:
            out[i] = (best[[i in s for s in sets]].mean() - best.mean()) / best.std()
    return out


PASS_AT = jax.jit(advantages.pass_at_k)


@given(st.data())
def test_pass_at_k_is_the_mean_over_all_sets_of_k_answers(data):
    values = data.draw(
        st.sampled_from([st.sampled_from([0.0, 1.0, nan]), st.sampled_from([-3.0, 0.35, 1.0, 2.0, nan])])
    )
    rewards, k = drawn(data, 3, 6, values), data.draw(st.integers(1, 6))
    got = PASS_AT(rewards, k=k)
    np.testing.assert_allclose(got, [by_enumeration(group, k) for group in rewards], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 4, 8])
@pytest.mark.parametrize("wrong", range(9))
def test_for_right_and_wrong_answers_it_is_the_closed_form_of_the_paper(k, wrong):
    n = 8
    rewards = np.array([[0.0] * wrong + [1.0] * (n - wrong)], np.float32)
    mean = 1 - comb(wrong, k) / comb(n, k)
    expected = np.zeros(n)
    if 0 < mean < 1:
        s = np.sqrt(mean * (1 - mean))
        expected[wrong:] = (1 - mean) / s
        expected[:wrong] = (1 - mean - comb(wrong - 1, k - 1) / comb(n - 1, k - 1)) / s
    np.testing.assert_allclose(PASS_AT(rewards, k=k)[0], expected, rtol=1e-5, atol=1e-6)


def test_with_one_try_it_is_the_relative_advantage():
    rewards = np.array([[0.35, 0.4, -1.0, nan, 0.35], [nan, 1.0, 0.0, 0.0, 0.0]], np.float32)
    got = PASS_AT(rewards, k=1)
    np.testing.assert_allclose(got, advantages.group_relative_deepseek(rewards), rtol=1e-5, atol=1e-6)


def test_where_every_set_succeeds_nothing_is_left_to_learn():
    """With at most k - 1 wrong answers each set has a right one: exactly 0, and no rounding over a deviation of 0."""
    for n in (5, 13, 31):
        rewards = np.full((3, 31), nan, np.float32)
        rewards[:, :n] = 1
        rewards[1, 0], rewards[2, :3] = 0, 0
        np.testing.assert_array_equal(PASS_AT(rewards, k=4), 0)


def test_a_rare_success_counts_as_with_the_binomials_of_a_large_group():
    """C(1000, 16) is 10^34: near the end of float32, and C(1000, 64) far beyond it."""
    rewards = np.zeros((1, 1000), np.float32)
    rewards[0, 7] = 1
    for k in (16, 64):
        mean = k / 1000
        s = np.sqrt(mean * (1 - mean))
        got = np.asarray(PASS_AT(rewards, k=k)[0])
        np.testing.assert_allclose(got[7], (1 - mean) / s, rtol=1e-4)
        np.testing.assert_allclose(got[8], ((k - 1) / 999 - mean) / s, rtol=1e-3)


@pytest.mark.parametrize("k", [0.5, 0, nan])
def test_fewer_than_one_try_is_refused(k):
    with pytest.raises(ValueError, match="k must be in"):
        advantages.pass_at_k(np.ones((1, 4)), k=k)
