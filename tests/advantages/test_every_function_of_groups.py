"""What holds for each function from rewards [P, G] to advantages [P, G], alone or over the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pt_jax import advantages

nan = np.nan
PAIR = np.array([0.25, -0.5], np.float32)


def optimal_baseline(rewards):
    """With lengths that go with the answers, whichever way they are sorted."""
    return advantages.optimal_baseline(rewards, 1 + jnp.square(rewards))


def per_reward_normalised(rewards):
    return advantages.per_reward_normalised(jnp.stack([rewards, jnp.square(rewards)], -1), PAIR)


def pass_at_2(rewards):
    return advantages.pass_at_k(rewards, k=2)


ALONE = [
    advantages.group_centred,
    advantages.group_relative,
    advantages.group_relative_inside_root,
    advantages.group_relative_deepseek,
    advantages.group_relative_article,
    advantages.group_relative_trl,
    advantages.group_relative_verl,
    advantages.leave_one_out,
    optimal_baseline,
    pass_at_2,
]
OVER_THE_BATCH = [
    advantages.batch_normalised,
    advantages.leave_one_out_normalised,
    advantages.reinforce_plus_plus_baseline,
    per_reward_normalised,
]


def each(functions):
    return pytest.mark.parametrize("fn", [jax.jit(fn) for fn in functions], ids=lambda fn: fn.__name__)


EACH = each(ALONE + OVER_THE_BATCH)
reward = st.one_of(st.floats(-10, 10, width=16), st.sampled_from([0.0, 1.0, 0.35, 0.4]))


def groups(data, size):
    return np.array(data.draw(st.lists(reward, min_size=3 * size, max_size=3 * size)), np.float32).reshape(3, size)


@EACH
@given(st.data())
def test_a_reward_of_nan_leaves_the_others_as_if_it_had_not_been_there(fn, data):
    rewards = groups(data, 4)
    at = data.draw(st.lists(st.integers(0, 4), min_size=3, max_size=3))
    with_nan = np.stack([np.insert(group, i, nan) for group, i in zip(rewards, at)])
    got, expected = np.asarray(fn(with_nan)), np.asarray(fn(rewards))
    assert (got[np.isnan(with_nan)] == 0).all()
    np.testing.assert_allclose(got[~np.isnan(with_nan)].reshape(3, 4), expected, rtol=1e-4, atol=1e-5)


@EACH
@given(st.data())
def test_whoever_is_moved_takes_the_advantage_along(fn, data):
    """Groups mixed by a shuffle or a split would give an answer the advantage of another."""
    rewards = groups(data, 5)
    rewards[data.draw(st.integers(0, 2)), data.draw(st.integers(0, 4))] = nan
    columns, rows = (np.array(data.draw(st.permutations(range(n)))) for n in (5, 3))
    got = fn(rewards[rows][:, columns])
    np.testing.assert_allclose(got, np.asarray(fn(rewards))[rows][:, columns], rtol=1e-4, atol=1e-5)


@EACH
@pytest.mark.parametrize("size", range(2, 10))
def test_equal_rewards_give_exactly_zero(fn, size):
    """0.35 in float32 is not the mean of n times 0.35: a leave-one-out deviation of 1e-8 once made 4000 of it."""
    rewards = np.repeat(np.array([[0.35], [0.35], [0.35]], np.float32), size + 1, axis=1)
    rewards[:, size] = nan  # one shape for all sizes is one compilation, and no other sum
    rewards = np.pad(rewards, [(0, 0), (0, 9 - size)], constant_values=nan)
    np.testing.assert_array_equal(fn(rewards), 0)


@EACH
def test_one_outlier_among_equal_rewards_gives_no_giants(fn):
    """0.35, 0.4, 0.3 and one outlier, in every group size: nothing exceeds what the largest group can give."""
    rewards = np.full((24, 10), nan, np.float32)
    for i, (size, low, out) in enumerate(
        (size, low, out) for size in range(3, 11) for low, out in [(0.35, 0.4), (0.35, 0.3), (0.4, -5.0)]
    ):
        rewards[i, :size] = low
        rewards[i, size - 1] = out
    got = np.asarray(fn(rewards))
    assert np.isfinite(got).all() and (np.abs(got) < 8).all()
    # which equal rewards one gets must not depend on one's place
    for row, r in zip(got, rewards):
        equal = row[r == r[0]]
        np.testing.assert_allclose(equal, equal[0], rtol=1e-5, atol=1e-6)


@EACH
def test_groups_that_nobody_judged_get_zero(fn):
    np.testing.assert_array_equal(fn(np.full((2, 3), nan, np.float32)), 0)
    rewards = np.array([[nan, nan, nan], [0.0, 1.0, nan], [nan, 1.0, nan]], np.float32)
    assert (np.asarray(fn(rewards))[0] == 0).all()
    if "normalised" not in fn.__name__ and "plus_plus" not in fn.__name__:
        assert (np.asarray(fn(rewards))[2] == 0).all()


@each(ALONE)
def test_groups_do_not_hear_of_each_other(fn):
    rewards = np.array([[0.35, 0.35, 0.4], [100.0, -3.0, nan], [1.0, 0.0, 0.0]], np.float32)
    together = np.asarray(fn(rewards))
    for p in range(3):
        np.testing.assert_allclose(fn(rewards[p : p + 1])[0], together[p], rtol=1e-6, atol=1e-7)


@each(OVER_THE_BATCH)
def test_the_spread_is_that_of_the_batch(fn):
    rewards = np.array([[0.0, 1.0, 0.0], [0.0, 1.0, 1.0]], np.float32)
    wide = np.concatenate([rewards, [[-50.0, 50.0, 0.0]]]).astype(np.float32)
    assert np.abs(fn(wide)[:2]).max() < 0.5 * np.abs(fn(rewards)).max() or fn.__name__ == "per_reward_normalised"
    assert (np.asarray(fn(wide))[:2] != np.asarray(fn(rewards))).any()


@EACH
def test_a_single_answer_cannot_be_compared(fn):
    with pytest.raises(ValueError, match="groups of 1"):
        fn(np.zeros((3, 1), np.float32))


@EACH
def test_whole_numbers_are_compared_in_float32(fn):
    got = fn(np.array([[1, 0, 0], [1, 1, 0]], np.int32))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, fn(np.array([[1, 0, 0], [1, 1, 0]], np.float32)), rtol=1e-6)
