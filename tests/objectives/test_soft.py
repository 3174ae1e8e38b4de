import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from objective_batches import ADVANTAGES, BATCH, MASK, RATIOS, batches, compiled, far, rows_of

from pt_jax.objectives import clipped, soft

without_old = lambda fn: lambda logps, old_logps, advantages, mask, **k: fn(logps, advantages, mask, **k)
FUNCTIONS = {
    "reinforce": without_old(soft.reinforce),
    "on_policy": without_old(soft.on_policy),
    "gpg": without_old(soft.gpg),
    "unclipped_surrogate": soft.unclipped_surrogate,
    "cispo": soft.cispo,
    "sapo": soft.sapo,
    "vespo": soft.vespo,
}
FAST = {name: compiled(fn) for name, fn in FUNCTIONS.items()}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# What each makes of a row: the loss and its slope in each token's logp, in float64.


def reinforce_by_the_equation(logps, log_ratio, a):
    return -a * logps, -a


def on_policy_by_the_equation(logps, log_ratio, a):
    return -a, -a


def gpg_by_the_equation(logps, log_ratio, a, scale=1.0):
    return -scale * a * logps, -scale * a


def unclipped_surrogate_by_the_equation(logps, log_ratio, a):
    return -np.exp(log_ratio) * a, -np.exp(log_ratio) * a


def cispo_by_the_equation(logps, log_ratio, a, cap=5.0):
    held = np.minimum(np.exp(log_ratio), cap)
    return -held * a * logps, -held * a


def sapo_by_the_equation(logps, log_ratio, a, temperature_pos=1.0, temperature_neg=1.05):
    temperature, r = np.where(a > 0, temperature_pos, temperature_neg), np.exp(log_ratio)
    p = sigmoid(temperature * (r - 1))
    return -4 / temperature * p * a, -4 * p * (1 - p) * r * a


def vespo_by_the_equation(logps, log_ratio, a, k_pos=2.0, lambda_pos=3.0, k_neg=3.0, lambda_neg=2.0):
    w = np.exp(log_ratio.sum())
    k, rate = np.where(a >= 0, k_pos, k_neg), np.where(a >= 0, lambda_pos, lambda_neg)
    phi = np.exp(rate) * w**k * np.exp(-rate * w)
    return -phi * a * logps, -phi * a


BY_THE_EQUATION = {name: globals()[f"{name}_by_the_equation"] for name in FUNCTIONS}
OTHER_NUMBERS = {
    "gpg": {"scale": 2.5},
    "cispo": {"cap": 1.2},
    "sapo": {"temperature_pos": 0.4, "temperature_neg": 2.0},
    "vespo": {"k_pos": 1.5, "lambda_pos": 1.0, "k_neg": 0.5, "lambda_neg": 0.7},
}


def assert_the_equation(name, batch, numbers):
    loss, slope = (np.zeros(batch[3].shape) for _ in range(2))
    for i, t, log_ratio, a in rows_of(*batch):
        loss[i, t], slope[i, t] = BY_THE_EQUATION[name](batch[0][i, t].astype(np.float64), log_ratio, a, **numbers)
    got_loss, got_slope = FAST[name](*batch, **numbers)
    assert got_loss.dtype == got_slope.dtype == jnp.float32
    np.testing.assert_allclose(got_loss, loss, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(got_slope, slope, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", [*FUNCTIONS])
@given(batch=batches())
def test_the_equation_holds_for_any_ratio_advantage_and_length(name, batch):
    assert_the_equation(name, batch, {})


@pytest.mark.parametrize("name", [*OTHER_NUMBERS])
@given(batch=batches())
def test_the_equation_holds_for_other_numbers(name, batch):
    assert_the_equation(name, batch, OTHER_NUMBERS[name])


@pytest.mark.parametrize("name", ["reinforce", "unclipped_surrogate", "sapo"])
def test_the_gradient_is_the_slope_of_the_loss(name, slope):
    def total(x):
        clean = [np.where(MASK, y, 0) for y in BATCH[1:3]]
        return sum(BY_THE_EQUATION[name](x[i, t], r, a)[0].sum() for i, t, r, a in rows_of(x, *clean, MASK))

    expected = slope(total, np.where(MASK, BATCH[0], 0))
    np.testing.assert_allclose(FAST[name](*BATCH)[1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cispo", "vespo"])
def test_what_is_held_constant_is_held_constant(name, slope):
    """The gradient is the slope of the loss whose factor does not move; the loss as a whole has another slope."""
    logps, old_logps, advantages = (np.where(MASK, x, 0).astype(np.float64) for x in BATCH[:3])

    def total(x, factor_of):
        rows = zip(rows_of(x, old_logps, advantages, MASK), rows_of(factor_of, old_logps, advantages, MASK))
        # the loss is its factor, a function of the log-ratio, times logp
        factor = lambda r, a: BY_THE_EQUATION[name](np.ones_like(r), r, a)[0]
        return sum((factor(still, a) * x[i, t]).sum() for (i, t, _, a), (_, _, still, _) in rows)

    gradient = np.asarray(FAST[name](*BATCH)[1])
    np.testing.assert_allclose(gradient, slope(lambda x: total(x, logps), logps), rtol=1e-4, atol=1e-6)
    moving = slope(lambda x: total(x, x), logps)
    assert np.abs(gradient - moving).max() > 0.1


def test_cispo_does_not_turn_round_for_unlikely_tokens():
    """Without its stop-gradient, the gradient at logp -3 has the factor 1 + logp = -2."""
    x = np.full((1, 1), -3, np.float32)
    _, gradient = FAST["cispo"](x, x, np.ones_like(x), np.ones((1, 1), bool))
    np.testing.assert_array_equal(gradient, -1)


def test_cispo_keeps_the_gradient_of_a_token_that_ppo_drops():
    x = np.log(np.float32([[9.0]]))
    batch = x, np.zeros_like(x), np.ones_like(x), np.ones((1, 1), bool)
    np.testing.assert_array_equal(compiled(clipped.clipped_surrogate)(*batch)[1], 0)
    np.testing.assert_allclose(FAST["cispo"](*batch, cap=1.28)[1], -1.28, rtol=1e-6)


@pytest.mark.parametrize("name", [*FUNCTIONS])
def test_on_the_policy_that_sampled_all_are_one_method(name):
    batch = BATCH[1], BATCH[1], BATCH[2], MASK
    expected = np.where(MASK, -ADVANTAGES, 0).astype(np.float32)
    np.testing.assert_allclose(FAST[name](*batch)[1], expected, rtol=1e-6)
    if name in ("on_policy", "unclipped_surrogate"):
        np.testing.assert_array_equal(FAST[name](*batch)[0], expected)


@pytest.mark.parametrize("gap", [50.0, -50.0, 200.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("name", ["cispo", "sapo", "vespo"])
def test_a_ratio_far_away_has_finite_loss_and_gradient(name, gap, advantage):
    batch = far(gap, advantage)
    loss, gradient = FAST[name](*batch)
    assert np.isfinite(loss).all() and np.isfinite(gradient).all()
    curvature = jax.grad(lambda x: jax.grad(lambda y: FUNCTIONS[name](y, *batch[1:]).sum())(x).sum())(batch[0])
    assert np.isfinite(curvature).all()
    assert name == "cispo" or np.abs(gradient).max() < 1e-15  # soft, but gone


def test_cispo_lets_no_ratio_above_the_cap_and_every_one_below():
    np.testing.assert_allclose(FAST["cispo"](*far(50.0, 1.0))[1], -5, rtol=1e-6)
    np.testing.assert_allclose(FAST["cispo"](*far(-50.0, 1.0))[1], -np.exp(-50), rtol=1e-4)


def test_sapo_fades_smoothly_and_never_stops():
    """The multiplier of the policy gradient: 1 at ratio 1, smaller on both sides, and not 0 where PPO's has a step."""
    x = np.log(np.float32([[0.2, 0.8, 1.0, 1.25, 4.0]]))
    good = x, np.zeros_like(x), np.ones_like(x), np.ones_like(x, bool)
    multiplier = -np.asarray(FAST["sapo"](*good)[1])[0] / np.exp(x[0])
    assert multiplier[2] == 1 and multiplier.argmax() == 2 and (multiplier > 0).all()
    hotter = -np.asarray(FAST["sapo"](*good, temperature_pos=3.0)[1])[0] / np.exp(x[0])
    assert (np.delete(hotter, 2) < np.delete(multiplier, 2)).all()


def test_sapos_temperatures_are_chosen_by_the_sign_of_the_advantage():
    x = np.full((1, 3), np.log(2.0), np.float32)
    advantages = np.float32([[1, -1, 0]])
    loss, _ = FAST["sapo"](
        x, np.zeros_like(x), advantages, np.ones((1, 3), bool), temperature_pos=1.0, temperature_neg=4.0
    )
    np.testing.assert_allclose(loss, [[-4 * sigmoid(1.0), sigmoid(4.0), 0]], rtol=1e-6)


def test_vespo_counts_an_answer_most_where_the_gamma_density_is_highest():
    """w = k / lambda; 2/3 for good answers, 3/2 for bad ones."""
    ratios = np.linspace(0.1, 3, 291)
    x = np.log(ratios)[:, None].astype(np.float32)
    for sign, peak in ((1, 2 / 3), (-1, 3 / 2)):
        phi = soft.vespo_weights(x, np.zeros_like(x), np.full_like(x, sign), np.ones_like(x, bool))
        np.testing.assert_allclose(ratios[np.argmax(phi)], peak, atol=0.01)


def test_vespos_weight_is_of_the_whole_answer_at_each_of_its_tokens():
    x = np.log(np.float32([[2.0, 0.5, 3.0, 9.0], [1.0, 1.0, 1.0, 1.0]]))
    mask = np.array([[True, True, True, False], [True] * 4])
    phi = soft.vespo_weights(x, np.zeros_like(x), np.ones_like(x), mask)
    np.testing.assert_allclose(phi[0, :3], 9 * np.exp(-6), rtol=1e-5)
    np.testing.assert_array_equal(phi[1], 1)
    assert phi[0, 3] == 0


def test_no_gradient_flows_through_vespos_weight():
    for of in (0, 1):
        gradient = jax.grad(lambda *x: soft.vespo_weights(*x, *BATCH[2:]).sum(), of)(*BATCH[:2])
        np.testing.assert_array_equal(gradient, 0)


def test_vespos_weight_of_a_strange_sampler_is_the_whole_ratio():
    """log(p / p_old) + log(p_old / p_sampler): handing in the sampler's log-probabilities is the correction."""
    rng = np.random.default_rng(0)
    x, old, sampler = -rng.uniform(1, 2, (3, 2, 4))
    got = soft.vespo_weights(x, sampler, np.ones_like(x), np.ones_like(x, bool))
    w = np.exp((x - old).sum(1) + (old - sampler).sum(1))
    np.testing.assert_allclose(got[:, 0], w**2 * np.exp(3 - 3 * w), rtol=1e-4)


GROUPS = st.lists(st.lists(st.sampled_from([0.0, 0.35, 1.0, np.nan]), min_size=3, max_size=3), min_size=4, max_size=4)


@given(GROUPS)
def test_gpgs_scale_counts_the_groups_that_teach(rewards):
    rewards = np.array(rewards, np.float32)
    groups = [row[~np.isnan(row)] for row in rewards]
    judged = [row for row in groups if len(row)]
    teaching = [row for row in judged if len(set(row.tolist())) > 1]
    np.testing.assert_allclose(soft.gpg_scale(rewards), max(len(judged), 1) / max(len(teaching), 1))


def test_gpgs_scale_makes_up_for_groups_of_equal_rewards():
    """The mean over a batch with two dead groups among four, times the scale, is the mean without them."""
    rewards = np.float32([[0, 1], [1, 1], [0, 0], [1, 0]])
    centred = rewards - rewards.mean(1, keepdims=True)
    np.testing.assert_allclose(soft.gpg_scale(rewards) * np.abs(centred).mean(), np.abs(centred[[0, 3]]).mean())


def test_the_batch_of_these_tests_is_ugly():
    assert (RATIOS[MASK] < 0.6).any() and (RATIOS[MASK] > 1.9).any() and not MASK[1].any()
