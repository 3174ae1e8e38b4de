"""Groups of rewards as they really come: fractions, ties, an outlier, an answer that could not be judged."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st

from pt_jax import advantages

nan = np.nan
REWARDS = np.array(  # [P=5, G=5]: ties with an outlier, signs and scales, one unjudged, one judged, none judged
    [
        [0.35, 0.35, 0.35, 0.35, 0.4],
        [0.1, -2.0, 1000.3, 0.3, 0.35],
        [nan, 0.35, 0.4, 0.3, -1.0],
        [nan, nan, 0.35, nan, nan],
        [nan, nan, nan, nan, nan],
    ],
    np.float32,
)


def by_the_equation(name, rewards, epsilon=1e-4):
    """One group after the other in float64, over the answers that were judged."""
    out = np.zeros(rewards.shape)
    for p, group in enumerate(np.asarray(rewards, np.float64)):
        judged = [r for r in group if not np.isnan(r)]
        for g, r in enumerate(group):
            if not np.isnan(r):
                centred = r - np.mean(judged)
                out[p, g] = centred if name == "group_centred" else centred / (np.std(judged) + epsilon)
    return out


# compiled once a shape, which is faster than one small program an operation
BOTH = pytest.mark.parametrize("fn", [jax.jit(advantages.group_centred), jax.jit(advantages.group_relative)])


class AdvantagesTest(parameterized.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    @parameterized.parameters("group_centred", "group_relative")
    def test_the_equation(self, name):
        got = self.variant(getattr(advantages, name))(REWARDS)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, by_the_equation(name, REWARDS), rtol=1e-5, atol=1e-5)

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_the_deviation_is_that_of_the_group_and_not_of_a_sample(self):
        """Over G - 1, two answers would get 0.707 each."""
        got = self.variant(advantages.group_relative)(np.array([[0.0, 1.0], [5.0, 3.0]]), epsilon=1e-9)
        np.testing.assert_allclose(got, [[-1, 1], [1, -1]], rtol=1e-6)


@given(st.data())
@BOTH
def test_the_equation_holds_for_any_rewards(fn, data):
    p, g = data.draw(st.sampled_from([(1, 2), (3, 5), (2, 8)]))
    reward = st.one_of(st.floats(-10, 10, width=32), st.sampled_from([0.0, 1.0, 0.35, nan]))
    rewards = np.array(data.draw(st.lists(reward, min_size=p * g, max_size=p * g)), np.float32).reshape(p, g)
    got = np.asarray(fn(rewards))
    np.testing.assert_allclose(got, by_the_equation(fn.__name__, rewards), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(got.sum(1), 0, atol=1e-4)
    assert (np.abs(got) <= np.sqrt(g)).all() or fn.__name__ == "group_centred"


@BOTH
def test_equal_rewards_give_exactly_zero(fn):
    """The float32 mean of G copies of 0.35 is not 0.35, and a residue over a deviation of 0 is an advantage."""
    rewards = np.array([[0.35], [0.1], [-0.7], [1e-8], [1e6]], np.float32)
    for size in range(2, 18):
        np.testing.assert_array_equal(fn(np.repeat(rewards, size, axis=1)), 0)
    uncompiled = getattr(advantages, fn.__name__)  # sums in another order
    np.testing.assert_array_equal(uncompiled(np.repeat(rewards, 7, axis=1)), 0)


@BOTH
def test_equal_rewards_beside_an_unjudged_one_give_exactly_zero(fn):
    rewards = np.full((7, 7), 0.35, np.float32)
    np.fill_diagonal(rewards, nan)
    np.testing.assert_array_equal(fn(rewards), 0)


@BOTH
@pytest.mark.parametrize("size", [2, 3, 7, 16])
def test_one_outlier_among_equal_rewards(fn, size):
    rewards = np.full((3, size), 0.35, np.float32)
    rewards[:, -1] = [0.4, 0.3, -5.0]
    np.testing.assert_allclose(fn(rewards), by_the_equation(fn.__name__, rewards), rtol=1e-4)


@BOTH
@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_reward_of_nan_takes_only_itself_out(fn, at):
    group = np.array([[0.1, 0.35, 0.8, 0.35]], np.float32)
    got = np.asarray(fn(np.insert(group, at, nan, axis=1)))
    assert got[0, at] == 0
    np.testing.assert_allclose(np.delete(got, at, axis=1), fn(group), rtol=1e-6)


@BOTH
def test_a_group_that_nobody_judged_gets_zero(fn):
    np.testing.assert_array_equal(fn(REWARDS)[-1], 0)


@BOTH
def test_groups_do_not_hear_of_each_other(fn):
    together = np.asarray(fn(REWARDS))
    for p in range(len(REWARDS)):
        np.testing.assert_allclose(fn(REWARDS[p : p + 1])[0], together[p], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(fn(REWARDS[::-1]), together[::-1], rtol=1e-6, atol=1e-7)


@BOTH
def test_the_order_of_the_answers_does_not_matter(fn):
    order = [3, 0, 4, 1, 2]
    np.testing.assert_allclose(fn(REWARDS[:, order]), np.asarray(fn(REWARDS))[:, order], rtol=1e-5, atol=1e-6)


@BOTH
def test_a_bonus_for_everybody_changes_nothing(fn):
    rewards = np.array([[0.5, 0.25, 2.0, -1.0]], np.float32)  # exact in float32 with the bonus added
    np.testing.assert_array_equal(fn(rewards + 1024), fn(rewards))


def test_relative_advantages_have_deviation_one_and_stay_so():
    once = np.asarray(advantages.group_relative(REWARDS[:2], epsilon=1e-9))
    np.testing.assert_allclose(once.std(1), 1, rtol=1e-5)
    np.testing.assert_allclose(advantages.group_relative(once, epsilon=1e-9), once, rtol=1e-5, atol=1e-6)


def test_epsilon_keeps_a_hair_from_being_a_mountain():
    hair = np.array([[0.0, 2e-4]], np.float32)
    np.testing.assert_allclose(advantages.group_relative(hair), [[-0.5, 0.5]], rtol=1e-5)
    np.testing.assert_allclose(advantages.group_relative(hair, epsilon=3e-4), [[-0.25, 0.25]], rtol=1e-5)


@BOTH
def test_whole_numbers_and_bfloat16_are_compared_in_float32(fn):
    for dtype in (jnp.int32, jnp.bfloat16, bool):
        got = fn(jnp.array([[1, 0, 0], [1, 1, 1]], dtype))
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, fn(jnp.array([[1.0, 0, 0], [1, 1, 1]])), rtol=1e-6)


@BOTH
def test_a_single_answer_cannot_be_compared(fn):
    with pytest.raises(ValueError, match="rewards has groups of 1: a group needs at least 2 answers"):
        fn(np.zeros((3, 1)))


@BOTH
def test_rewards_that_are_not_in_groups_are_refused(fn):
    with pytest.raises(ValueError, match=r"rewards has shape \(15,\), expected \[P, G\]"):
        fn(np.zeros(15))


@pytest.mark.parametrize("epsilon", [0.0, -1e-4, nan])
def test_an_epsilon_that_is_not_positive_is_refused(epsilon):
    with pytest.raises(ValueError, match="epsilon must be above 0"):
        advantages.group_relative(REWARDS, epsilon=epsilon)


def test_trl_centres_the_same(trl):
    case = trl("grpo_advantage/scale_False")
    rewards = case.inputs.r1.reshape(-1, case.options.num_generations).astype(np.float32)
    np.testing.assert_allclose(advantages.group_centred(rewards).ravel(), case.outputs.advantages, rtol=1e-5)


def test_trl_divides_by_the_deviation_of_a_sample(trl):
    """c / (s sqrt(G / (G - 1)) + e) = f c / (s + f e) with f = sqrt((G - 1) / G)."""
    case = trl("grpo_advantage/scale_group")
    rewards = case.inputs.r1.reshape(-1, case.options.num_generations).astype(np.float32)
    f = np.sqrt(1 - 1 / case.options.num_generations)
    got = f * advantages.group_relative(rewards, epsilon=1e-4 * f)
    np.testing.assert_allclose(got.ravel(), case.outputs.advantages, rtol=1e-5)


def test_trl_passes_over_the_same_unjudged_answer(trl):
    """Leaving one out of n compares with the others' mean: n / (n - 1) times as far as the mean of all."""
    case = trl("rloo_advantage/unscorable_row")
    rewards = case.inputs.r1_with_none.reshape(-1, case.options.num_generations).astype(np.float32)
    n = np.sum(~np.isnan(rewards), 1, keepdims=True)
    got = advantages.group_centred(rewards) * (n / (n - 1)).astype(np.float32)
    np.testing.assert_allclose(got.ravel(), case.outputs.advantages, rtol=1e-5)
