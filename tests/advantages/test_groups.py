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


# ---- the denominators that one name stands for

GOLDEN = np.array([[1.0, 2.0, 3.0, 6.0]], np.float32)  # mean 3, squares 4 + 1 + 0 + 9 = 14
CENTRED = np.array([[-2.0, -1.0, 0.0, 3.0]])


@pytest.mark.parametrize(
    ("fn", "denominator"),
    [
        (advantages.group_relative, np.sqrt(14 / 4) + 1e-4),
        (advantages.group_relative_inside_root, np.sqrt(14 / 4 + 1e-8)),
        (advantages.group_relative_deepseek, np.sqrt(14 / 4)),
        (advantages.group_relative_article, np.sqrt(14 / 4 + 1e-8)),
        (advantages.group_relative_trl, np.sqrt(14 / 3) + 1e-4),
        (advantages.group_relative_verl, np.sqrt(14 / 3) + 1e-6),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_each_preset_has_its_own_denominator(fn, denominator):
    np.testing.assert_allclose(fn(GOLDEN), CENTRED / denominator, rtol=1e-6)


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (advantages.group_relative, 0.5),  # 1e-4 / (1e-4 + 1e-4)
        (advantages.group_relative_article, np.sqrt(0.5)),  # 1e-4 / sqrt(1e-8 + 1e-8)
        (advantages.group_relative_deepseek, 1.0),
        (advantages.group_relative_trl, 1 / (np.sqrt(2) + 1)),
        (advantages.group_relative_verl, 1 / (np.sqrt(2) + 0.01)),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_the_presets_part_where_rewards_hardly_differ(fn, expected):
    np.testing.assert_allclose(fn(np.array([[0.0, 2e-4]], np.float32)), [[-expected, expected]], rtol=1e-5)


@pytest.mark.parametrize("size", [2, 8])
def test_the_deviation_of_a_sample_is_larger_by_the_root_of_g_over_g_less_one(size):
    rewards = np.arange(size, dtype=np.float32)[None] ** 2
    of_these, of_all = (np.asarray(advantages.group_relative(rewards, ddof=d, epsilon=1e-9)) for d in (0, 1))
    np.testing.assert_allclose(of_these, np.sqrt(size / (size - 1)) * of_all, rtol=1e-5)


RELATIVE = [
    advantages.group_relative,
    advantages.group_relative_article,
    advantages.group_relative_deepseek,
    advantages.group_relative_trl,
    advantages.group_relative_verl,
]


@pytest.mark.parametrize("fn", RELATIVE, ids=lambda fn: fn.__name__)
def test_normalised_once_is_normalised_for_good(fn):
    """Dividing by the deviation a second time must do nothing, or somewhere it is done twice."""
    ddof = 1 if fn in RELATIVE[3:] else 0
    once = np.asarray(fn(GOLDEN))
    np.testing.assert_allclose(once.std(ddof=ddof), 1, rtol=1e-3)
    np.testing.assert_allclose(fn(once), once, rtol=2e-4, atol=1e-6)


# ---- deviation, leave one out


@given(st.data())
def test_the_deviation_is_that_of_numpy(data):
    p, g = data.draw(st.sampled_from([(1, 2), (3, 5)]))
    reward = st.one_of(st.floats(-10, 10, width=16), st.just(nan))
    rewards = np.array(data.draw(st.lists(reward, min_size=p * g, max_size=p * g)), np.float32).reshape(p, g)
    for ddof in (0, 1):
        expected = [np.std(r[~np.isnan(r)], ddof=ddof) if sum(~np.isnan(r)) > ddof else nan for r in rewards * 1.0]
        np.testing.assert_allclose(DEVIATION(rewards, ddof=float(ddof)), expected, rtol=1e-4, atol=1e-5)


DEVIATION = jax.jit(advantages.group_deviation)


def test_a_group_that_teaches_nothing_is_known_by_its_deviation_of_zero():
    got = advantages.group_deviation(np.array([[0.35] * 7, [0.35] * 6 + [0.36]], np.float32))
    assert got[0] == 0 < got[1]


LEAVE_ONE_OUT = jax.jit(advantages.leave_one_out)


@given(st.data())
def test_leaving_one_out_compares_with_the_mean_of_the_others(data):
    p, g = data.draw(st.sampled_from([(1, 2), (3, 5)]))
    reward = st.one_of(st.floats(-10, 10, width=32), st.sampled_from([0.35, 0.4, nan]))
    rewards = np.array(data.draw(st.lists(reward, min_size=p * g, max_size=p * g)), np.float32).reshape(p, g)
    expected = np.zeros((p, g))
    for i, j in np.ndindex(p, g):
        others = [np.float64(r) for h, r in enumerate(rewards[i]) if h != j and not np.isnan(r)]
        expected[i, j] = 0 if np.isnan(rewards[i, j]) or not others else rewards[i, j] - np.mean(others)
    np.testing.assert_allclose(LEAVE_ONE_OUT(rewards), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [2, 3, 7, 16])
@pytest.mark.parametrize(("most", "outlier"), [(0.35, 0.4), (0.35, 0.3), (0.4, 0.35)])
def test_leaving_one_out_leaves_no_residue(size, most, outlier):
    """The n - 1 equal ones differ from each other by exactly nothing, and from the outlier by one (n - 1)-th of it."""
    rewards = np.full((1, size), most, np.float32)
    rewards[0, -1] = outlier
    got = np.asarray(advantages.leave_one_out(rewards), np.float64)[0]
    gap = np.float64(np.float32(outlier)) - np.float64(np.float32(most))
    np.testing.assert_array_equal(got[:-1], got[0])
    np.testing.assert_allclose(got, [-gap / (size - 1)] * (size - 1) + [gap], rtol=1e-5)


@pytest.mark.parametrize("ddof", [-0.5, 2.0, nan])
def test_a_ddof_out_of_range_is_refused(ddof):
    for fn in (advantages.group_relative, advantages.group_relative_inside_root, advantages.group_deviation):
        with pytest.raises(ValueError, match="ddof must be in"):
            fn(REWARDS, ddof=ddof)
