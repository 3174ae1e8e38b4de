import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pt_jax import weights
from pt_jax.losses import preference

NAN = np.nan
MASK = np.array([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]], bool)
RNG = np.random.default_rng(5)
LOGPS, REF_LOGPS = (np.where(MASK, -RNG.uniform(0.1, 5, MASK.shape), NAN).astype(np.float32) for _ in range(2))
WIN_RATES = np.array([0.9, 0.2, 0.4], np.float32)

# ---- the pair


@pytest.mark.parametrize(
    ("rewards", "signs"),
    [
        ([0.2, 0.9], [-1, 1]),
        ([0.9, 0.2], [1, -1]),
        ([0.5, 0.5], [1, -1]),  # the first is chosen where they are equal
        ([0.1, 0.7, 0.1, 0.7], [0, 1, -1, 0]),
        ([NAN, 0.7, 0.1], [0, 1, -1]),
        ([NAN, 0.7, NAN], [0, 0, 0]),
        ([-np.inf, np.inf, NAN], [-1, 1, 0]),
        ([NAN, NAN], [0, 0]),
    ],
)
def test_the_best_is_chosen_and_the_worst_rejected(rewards, signs):
    np.testing.assert_array_equal(preference.best_against_worst(np.array([rewards], np.float32)), [signs])


@given(st.lists(st.sampled_from([0.0, 0.35, 1.0, NAN]), min_size=4, max_size=4))
def test_a_group_gives_one_pair_or_none(rewards):
    rewards = np.array([rewards], np.float32)
    signs = np.asarray(preference.best_against_worst(rewards))
    judged = ~np.isnan(rewards)
    if judged.sum() < 2:
        assert not signs.any()
        return
    assert sorted(signs[signs != 0]) == [-1, 1]
    assert rewards[signs > 0] == rewards[judged].max() and rewards[signs < 0] == rewards[judged].min()


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="rewards has groups of 1"):
        preference.best_against_worst(np.zeros((3, 1), np.float32))


# ---- WPO


def test_a_row_weighs_as_much_as_the_policy_would_say_it():
    sq = np.where(MASK, -RNG.uniform(0.1, 3, MASK.shape), NAN).astype(np.float32)
    gap = np.where(MASK, LOGPS.astype(np.float64) - sq, 0)
    expected = np.exp(gap.sum(1) / np.maximum(MASK.sum(1), 1))
    np.testing.assert_allclose(preference.wpo_weights(LOGPS, sq, MASK), expected, rtol=1e-5)
    np.testing.assert_allclose(expected[1], 1)


def test_no_gradient_flows_through_the_weights():
    got = jax.grad(lambda x: preference.wpo_weights(x, REF_LOGPS, MASK).sum())(LOGPS)
    np.testing.assert_array_equal(got, 0)


@pytest.mark.parametrize("p", [[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1]])
def test_a_token_of_the_policy_weighs_one_on_average(p):
    """E_p[p(token) / sum p^2] = 1, for a distribution of any entropy."""
    p = np.array(p, np.float32)
    x, mask = np.log(np.maximum(p, 1e-30))[:, None], np.ones((4, 1), bool)
    w = preference.wpo_weights(x, np.full((4, 1), np.log((p**2).sum()), np.float32), mask)
    np.testing.assert_allclose((p * w).sum(), 1, rtol=1e-5)


# ---- XPO


def test_xpo_is_dpo_with_a_bonus_for_what_the_reference_does_not_say():
    pair = -RNG.uniform(1, 9, (4, 3)).astype(np.float32)
    got = preference.xpo(*pair, pair[1], beta=0.3, alpha=0.02)
    np.testing.assert_allclose(got, preference.dpo(*pair, beta=0.3) + 0.02 * pair[1], rtol=1e-5)
    np.testing.assert_allclose(preference.xpo_bonus(pair[1], alpha=0.02), 0.02 * pair[1], rtol=1e-6)


def test_descent_on_the_bonus_makes_the_answers_of_the_reference_rarer():
    slope = jax.grad(lambda x: preference.xpo_bonus(x, alpha=0.02).sum())(np.full(2, -3, np.float32))
    np.testing.assert_allclose(slope, 0.02)


# ---- Nash-MD


def test_the_gradient_of_nash_md_is_that_of_the_game():
    """Over all answers of length 2 from a small vocabulary: the expected gradient of the loss is that of
    -(expected win rate) + beta KL(policy || reference), by enumeration."""
    rng, beta = np.random.default_rng(0), 0.3
    theta, ref = (rng.normal(size=(4, 3)).astype(np.float32) for _ in range(2))  # first token; second after each first
    answers = np.array([*itertools.product(range(3), range(3))])
    wins = rng.uniform(size=9).astype(np.float32)

    def sums(theta):
        lp = jax.nn.log_softmax(theta)
        return jnp.stack([lp[0, a] + lp[1 + a, b] for a, b in answers])

    def game(theta):
        p = jnp.exp(sums(theta))
        return -(p * wins).sum() + beta * (p * (sums(theta) - sums(ref))).sum()

    p = jnp.exp(sums(theta))
    expected = jax.jit(jax.grad(game))(theta)
    by_rows = jax.jit(jax.grad(lambda t: (p * preference.nash_md(sums(t), sums(ref), wins, beta=beta)).sum()))(theta)
    np.testing.assert_allclose(by_rows, expected, atol=1e-6)

    def by_tokens(theta):
        lp, ref_lp = jax.nn.log_softmax(theta), jax.nn.log_softmax(ref)
        x, y = (jnp.stack([lp[0, answers[:, 0]], lp[1 + answers[:, 0], answers[:, 1]]], 1) for lp in (lp, ref_lp))
        loss = preference.nash_md_token_kl(x, y, wins, np.ones((9, 2), bool), beta=beta)
        return (p[:, None] * loss).sum()

    got = jax.jit(jax.grad(by_tokens))(theta)
    np.testing.assert_allclose(got[1:], expected[1:], atol=1e-6)  # the last token has no future
    assert np.abs(got[0] - expected[0]).max() > 1e-3  # the first one pays nothing for where it leads


def test_nash_md_by_hand():
    """A = 0.9 - 0.5 - 0.1 * 2 = 0.2."""
    x, ref = np.full(1, -3, np.float32), np.full(1, -5, np.float32)
    value, slope = jax.value_and_grad(lambda x: preference.nash_md(x, ref, WIN_RATES[:1])[0])(x)
    np.testing.assert_allclose([value, slope[0]], [0.6, -0.2], rtol=1e-5)


def test_the_token_form_pays_for_its_own_log_ratio():
    def by_the_equation(x, ref):
        advantages = WIN_RATES[:, None].astype(np.float64) - 0.5 - 0.3 * (x - ref)
        return np.where(MASK, -advantages * x, 0), np.where(MASK, -advantages, 0)

    loss = lambda x: preference.nash_md_token_kl(x, REF_LOGPS, WIN_RATES, MASK, beta=0.3)
    expected, slope = by_the_equation(*(np.where(MASK, x, 0).astype(np.float64) for x in (LOGPS, REF_LOGPS)))
    np.testing.assert_allclose(loss(LOGPS), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(lambda x: loss(x).sum())(LOGPS), slope, rtol=1e-5)


def test_the_two_forms_are_one_without_a_kl():
    mask = MASK[[0, 2]]
    rows = lambda x: weights.zero_unscored(mask, x[[0, 2]])[0].sum(1)
    tokens = preference.nash_md_token_kl(LOGPS[[0, 2]], REF_LOGPS[[0, 2]], WIN_RATES[[0, 2]], mask, beta=0.0)
    np.testing.assert_allclose(
        tokens.sum(1), preference.nash_md(rows(LOGPS), rows(REF_LOGPS), WIN_RATES[[0, 2]], beta=0.0), rtol=1e-5
    )


# ---- A*-PO


@given(
    rewards=st.lists(st.sampled_from([0.0, 0.35, 1.0, -2.0, NAN]), min_size=5, max_size=5),
    beta=st.sampled_from([0.05, 0.5, 3.0]),
)
def test_the_value_is_the_log_mean_exp_of_the_judged(rewards, beta):
    rewards = np.array([rewards], np.float32)
    r = rewards[~np.isnan(rewards)].astype(np.float64)
    expected = beta * np.log(np.exp((r - r.max()) / beta).mean()) + r.max() if len(r) else 0
    np.testing.assert_allclose(preference.optimal_value(rewards, beta=beta), expected, rtol=1e-4, atol=1e-6)


def test_the_value_runs_from_the_best_reward_to_the_mean():
    rewards = np.array([[0.0, 0.35, 1.0]], np.float32)
    np.testing.assert_allclose(preference.optimal_value(rewards, beta=1e-4), 1, atol=1e-3)
    np.testing.assert_allclose(preference.optimal_value(rewards, beta=1e3), 0.45, atol=1e-3)


def test_a_value_has_a_gradient_also_where_nothing_was_judged():
    rewards = np.array([[NAN, NAN], [0.0, 1.0]], np.float32)
    value, slope = jax.value_and_grad(lambda r: preference.optimal_value(r, beta=1.0).sum())(rewards)
    np.testing.assert_allclose(value, np.log((1 + np.e) / 2), rtol=1e-6)
    np.testing.assert_allclose(slope, [[0, 0], [1 / (1 + np.e), np.e / (1 + np.e)]], rtol=1e-5)


def test_a2po_by_the_equation(slope):
    x, ref, a = -RNG.uniform(1, 9, 4), -RNG.uniform(1, 9, 4), RNG.normal(size=4)
    equation = lambda x: (0.2 * (x - ref) - a) ** 2
    loss = lambda x: preference.a2po(x, np.float32(ref), np.float32(a), beta=0.2)
    np.testing.assert_allclose(loss(np.float32(x)), equation(x), rtol=1e-4)
    got = jax.grad(lambda x: loss(x).sum())(np.float32(x))
    np.testing.assert_allclose(got, slope(lambda x: equation(x).sum(), x), rtol=1e-4)


def test_the_best_policy_has_no_loss():
    """Its log-ratio is (r - V) / beta, and V is what makes its probabilities sum to one."""
    ref, rewards, beta = np.array([0.25, 0.25, 0.5]), np.array([1.0, 0.0, 0.3]), 0.5
    samples = np.array([[1.0, 0.0, 0.3, 0.3]], np.float32)  # each as often as the reference says it
    value = np.float64(preference.optimal_value(samples, beta=beta)[0])
    log_ratio = (rewards - value) / beta
    np.testing.assert_allclose((ref * np.exp(log_ratio)).sum(), 1, rtol=1e-6)
    got = preference.a2po(np.float32(log_ratio), np.zeros(3, np.float32), np.float32(rewards - value), beta=beta)
    np.testing.assert_allclose(got, 0, atol=1e-10)
