import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pt_jax import weights
from pt_jax.losses.preference import paired, unpaired

LOGPS = np.array([-35.2, -7.1, -120.35, -0.01, -9.0], np.float32)
REF_LOGPS = np.array([-38.0, -6.0, -118.0, -4.0, -9.0], np.float32)
DESIRABLE = np.array([True, False, True, False, True])
KTO_NUMBERS = {"beta": 0.2, "desirable_weight": 1.33, "undesirable_weight": 0.7}


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


def kto_by_the_equation(logps, ref_logps, desirable, kl, beta, desirable_weight, undesirable_weight):
    """With the value function v of the paper: loss = lambda - v."""
    r = np.float64(logps) - np.float64(ref_logps)
    v = np.where(desirable, desirable_weight * sigmoid(beta * (r - kl)), undesirable_weight * sigmoid(beta * (kl - r)))
    return np.where(desirable, desirable_weight, undesirable_weight) - v


def bco_by_the_equation(logps, ref_logps, desirable, shift, beta):
    logit = beta * (np.float64(logps) - np.float64(ref_logps)) - shift
    return np.logaddexp(0, np.where(desirable, -logit, logit))


KTO, BCO = jax.jit(unpaired.kto), jax.jit(unpaired.bco)
KTO_SLOPES = jax.jit(jax.grad(lambda *x, **numbers: unpaired.kto(*x, **numbers).sum(), (0, 1, 3)))
BCO_SLOPES = jax.jit(jax.grad(lambda *x, **numbers: unpaired.bco(*x, **numbers).sum(), (0, 1, 3)))
ANSWERS = st.lists(
    st.tuples(st.floats(-50, 0, width=32), st.floats(-50, 0, width=32), st.booleans()), min_size=5, max_size=5
)


def columns(answers):
    logps, ref_logps, desirable = zip(*answers)
    return np.array(logps, np.float32), np.array(ref_logps, np.float32), np.array(desirable)


# ---- KTO


@given(ANSWERS, st.floats(0, 20, width=32), st.sampled_from([0.015625, 0.1, 2.0]), st.sampled_from([0.0, 1.0, 1.33]))
def test_the_equation_of_kto(answers, kl, beta, weight):
    numbers = {"beta": beta, "desirable_weight": weight, "undesirable_weight": 0.7}
    got = KTO(*columns(answers), kl, **numbers)
    np.testing.assert_allclose(got, kto_by_the_equation(*columns(answers), kl, **numbers), rtol=1e-4, atol=1e-5)


def test_the_gradient_of_kto_is_the_slope_and_none_goes_into_the_kl(slope):
    policy, ref, kl = KTO_SLOPES(LOGPS, REF_LOGPS, DESIRABLE, 1.5, **KTO_NUMBERS)
    total = lambda x: kto_by_the_equation(x, REF_LOGPS, DESIRABLE, 1.5, **KTO_NUMBERS).sum()
    np.testing.assert_allclose(policy, slope(total, LOGPS), rtol=1e-4)
    np.testing.assert_allclose(ref, -policy, rtol=1e-6)
    assert kl == 0


def test_an_answer_as_likely_as_under_the_reference_is_worth_half_its_weight():
    np.testing.assert_allclose(KTO(LOGPS, LOGPS, DESIRABLE, 0.0, **KTO_NUMBERS), [0.665, 0.35, 0.665, 0.35, 0.665])


def test_the_reference_point_makes_gains_smaller_and_losses_smaller_too():
    """A policy that has moved far gains little from a desirable answer that moved with it."""
    near, far = (KTO(LOGPS, REF_LOGPS, DESIRABLE, kl) for kl in (0.0, 2.0))
    assert ((far > near) == DESIRABLE).all()


def test_descent_raises_the_desirable_and_lowers_the_others():
    policy, *_ = KTO_SLOPES(LOGPS, REF_LOGPS, DESIRABLE, 0.3, **KTO_NUMBERS)
    assert ((policy < 0) == DESIRABLE).all() and (policy != 0).all()


def test_an_undesirable_answer_is_a_desirable_one_seen_in_the_mirror():
    mirrored = KTO(REF_LOGPS + 2 * np.float32(0.8), LOGPS, ~DESIRABLE, 0.8)  # r -> 2 kl - r
    np.testing.assert_allclose(KTO(LOGPS, REF_LOGPS, DESIRABLE, 0.8), mirrored, rtol=1e-5)


def test_gains_and_losses_level_off_and_their_gradients_vanish():
    far = np.array([1e4, -1e4, 1e4, -1e4, 0], np.float32)
    zeros = np.zeros(5, np.float32)
    np.testing.assert_allclose(KTO(far, zeros, DESIRABLE, 0.0, beta=1.0), [0, 0, 0, 0, 0.5])
    np.testing.assert_allclose(KTO(far, zeros, ~DESIRABLE, 0.0, beta=1.0), [1, 1, 1, 1, 0.5])
    for labels in (DESIRABLE, ~DESIRABLE):
        np.testing.assert_array_equal(KTO_SLOPES(far, zeros, labels, 0.0, **KTO_NUMBERS)[0][:4], 0)


# ---- its reference point


def test_the_mismatched_kl_is_a_mean_of_at_least_zero():
    mean = np.full(4, 0.25, np.float32)
    logps, ref = np.array([-3.0, -4.0, -5.0, -6.0], np.float32), np.array([-4.0, -6.0, -4.5, -6.0], np.float32)
    kl, log_ratios = unpaired.mismatched_kl(logps, ref, mean)
    np.testing.assert_allclose(kl, (1 + 2 - 0.5 + 0) / 4)
    np.testing.assert_allclose(log_ratios, [1, 2, -0.5, 0])
    assert unpaired.mismatched_kl(ref, logps, mean)[0] == 0


def test_the_mismatched_kl_is_of_the_batch_and_not_a_mean_of_clamped_parts():
    logps, ref = np.array([-1.0, -9.0], np.float32), np.array([-4.0, -8.0], np.float32)
    whole = unpaired.mismatched_kl(logps, ref, np.full(2, 0.5, np.float32))[0]
    one = np.ones(1, np.float32)
    parts = [unpaired.mismatched_kl(logps[i : i + 1], ref[i : i + 1], one)[0] for i in (0, 1)]
    np.testing.assert_allclose([whole, np.mean(parts)], [1.0, 1.5])


@pytest.mark.parametrize("rubbish", [100.0, np.nan, np.inf])
def test_rows_that_fill_the_batch_do_not_move_the_kl(rubbish):
    logps, ref = np.array([-3.0, rubbish, -5.0], np.float32), np.array([-4.0, 0.0, -7.0], np.float32)
    kl, _ = unpaired.mismatched_kl(logps, ref, weights.row_mean(np.array([True, False, True])))
    np.testing.assert_allclose(kl, 1.5)


def test_nothing_is_learnt_through_the_kl():
    w = np.full(5, 0.2, np.float32)
    slopes = jax.grad(lambda *x: unpaired.mismatched_kl(*x)[0], (0, 1, 2))(LOGPS, REF_LOGPS, w)
    np.testing.assert_array_equal(np.stack(slopes), 0)


# ---- APO


@given(ANSWERS)
def test_apo_zero_is_kto_around_nothing(answers):
    numbers = {"beta": 0.2, "desirable_weight": 1.33, "undesirable_weight": 0.7}
    got = unpaired.apo_zero_unpaired(*columns(answers), **numbers)
    np.testing.assert_allclose(got, kto_by_the_equation(*columns(answers), 0.0, **numbers), rtol=1e-4, atol=1e-6)


def test_apo_zero_of_a_chosen_and_a_rejected_answer_is_that_of_the_pair():
    """1 - sigmoid(beta c) + sigmoid(beta r)."""
    c, r, zero = np.float32(1.7), np.float32(-0.4), np.zeros(2, np.float32)
    both = unpaired.apo_zero_unpaired(np.array([c, r]), zero, np.array([True, False]), beta=0.5)
    np.testing.assert_allclose(both.sum(), 1 - sigmoid(0.5 * c) + sigmoid(0.5 * r), rtol=1e-6)


# ---- BCO


@given(ANSWERS, st.floats(-5, 5, width=32), st.sampled_from([0.015625, 0.1, 2.0]))
def test_the_equation_of_bco(answers, shift, beta):
    got = BCO(*columns(answers), shift, beta=beta)
    np.testing.assert_allclose(got, bco_by_the_equation(*columns(answers), shift, beta), rtol=1e-4, atol=1e-5)


def test_the_gradient_of_bco_is_the_slope_and_none_goes_into_the_shift(slope):
    policy, ref, shift = BCO_SLOPES(LOGPS, REF_LOGPS, DESIRABLE, -0.4, beta=0.3)
    total = lambda x: bco_by_the_equation(x, REF_LOGPS, DESIRABLE, -0.4, 0.3).sum()
    np.testing.assert_allclose(policy, slope(total, LOGPS), rtol=1e-4)
    np.testing.assert_allclose(ref, -policy, rtol=1e-6)
    assert shift == 0


@given(ANSWERS, ANSWERS, st.floats(-5, 5, width=32))
def test_bco_bounds_dpo_from_above_whatever_the_shift(chosen, rejected, shift):
    """The theorem that the method stands on: sigmoid(a) sigmoid(b) < sigmoid(a + b)."""
    (c, ref_c, _), (r, ref_r, _) = columns(chosen), columns(rejected)
    yes = np.ones(5, bool)
    bound = BCO(c, ref_c, yes, shift, beta=0.1) + BCO(r, ref_r, ~yes, shift, beta=0.1)
    assert (bound >= paired.dpo(c, r, ref_c, ref_r, beta=0.1)).all()


def test_the_bound_is_tightest_with_the_shift_half_way_between_the_rewards():
    zero, (c, r) = np.zeros(1, np.float32), np.array([[3.0], [-1.0]], np.float32)
    yes = np.ones(1, bool)
    bound = lambda shift: (BCO(c, zero, yes, shift, beta=1.0) + BCO(r, zero, ~yes, shift, beta=1.0))[0]
    assert bound(1.0) < min(bound(0.8), bound(1.2), bound(0.0), bound(2.0))


@pytest.mark.parametrize("far", [1e4, -1e4])
def test_far_rewards_stay_finite(far):
    zeros, far = np.zeros(5, np.float32), np.full(5, far, np.float32)
    wrong = (far < 0) == DESIRABLE
    np.testing.assert_allclose(BCO(far, zeros, DESIRABLE, 0.0, beta=1.0), np.where(wrong, 1e4, 0))
    np.testing.assert_allclose(np.abs(BCO_SLOPES(far, zeros, DESIRABLE, 0.0, beta=1.0)[0]), wrong)


# ---- its shift

REWARDS = np.array([4.0, 1.0, -1.0, 7.0, 2.5, -3.0, 0.5, 9.0], np.float32)
REAL = np.array([1, 1, 1, 0, 1, 1, 1, 0], bool)
GOOD = np.array([1, 0, 0, 1, 0, 0, 0, 0], bool)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_running_mean_is_that_of_all_rewards_however_they_came(parts):
    state = unpaired.RunningMean()
    update = jax.jit(unpaired.RunningMean.update)
    for rewards, rows in zip(REWARDS.reshape(parts, -1), REAL.reshape(parts, -1)):
        state = update(state, np.where(rows, rewards, np.nan), rows)  # what fills a batch may be anything
    np.testing.assert_allclose(state.shift, REWARDS[REAL].mean(), rtol=1e-6)
    assert state.count == REAL.sum()


def test_the_running_mean_may_be_scanned_over():
    """Its structure and types do not change, also not those of a state that nobody has updated."""
    step = lambda state, batch: (state.update(*batch), state.shift)
    last, before = jax.lax.scan(step, unpaired.RunningMean(), (REWARDS.reshape(4, 2), REAL.reshape(4, 2)))
    np.testing.assert_allclose(before, [0.0, 2.5, 4 / 3, 3.5 / 5], rtol=1e-6)
    np.testing.assert_allclose(last.shift, REWARDS[REAL].mean(), rtol=1e-6)


@pytest.mark.parametrize("update", [
    lambda x: unpaired.RunningMean().update(x, REAL),
    lambda x: unpaired.MovingMidpoint().update(x, GOOD, REAL),
], ids=["RunningMean", "MovingMidpoint"])  # fmt: skip
def test_a_shift_is_a_constant(update):
    np.testing.assert_array_equal(jax.grad(lambda x: update(x).shift)(REWARDS), 0)


def test_a_batch_without_rows_leaves_the_states_as_they_were():
    none = np.zeros(8, bool)
    mean = unpaired.RunningMean().update(REWARDS, REAL)
    middle = unpaired.MovingMidpoint().update(REWARDS, GOOD, REAL)
    assert mean.update(REWARDS, none) == mean
    assert middle.update(REWARDS, GOOD, none) == middle


def test_the_moving_midpoint_by_hand():
    state = unpaired.MovingMidpoint().update(REWARDS, GOOD, REAL, decay=0.75)
    np.testing.assert_allclose([state.desirable, state.undesirable], [1.0, 0.0], atol=1e-7)  # 4 / 4, 0 / 4
    state = state.update(REWARDS, ~GOOD, REAL, decay=0.0)
    np.testing.assert_allclose([state.desirable, state.undesirable, state.shift], [0.0, 4.0, 2.0], atol=1e-6)


def test_a_batch_without_one_kind_leaves_its_average_alone():
    state = unpaired.MovingMidpoint().update(REWARDS, GOOD, REAL, decay=0.5)
    after = state.update(REWARDS + 1, np.zeros(8, bool), REAL, decay=0.5)
    assert after.desirable == state.desirable and after.undesirable != state.undesirable


def test_nothing_in_a_row_that_fills_the_batch_moves_the_midpoint():
    rubbish = np.where(REAL, REWARDS, np.nan)
    assert unpaired.MovingMidpoint().update(rubbish, GOOD, REAL) == unpaired.MovingMidpoint().update(
        REWARDS, GOOD, REAL
    )


def test_the_two_shifts_agree_on_as_many_good_as_bad_answers_and_on_no_other_share():
    every = np.ones(4, bool)
    for share in (1, 2, 3):
        good = np.arange(4) < share
        middle = unpaired.MovingMidpoint().update(REWARDS[:4], good, every, decay=0.0).shift
        mean = unpaired.RunningMean().update(REWARDS[:4], every).shift
        assert bool(jnp.isclose(middle, mean)) == (share == 2)


# ---- its weight


def test_the_density_ratio_is_the_odds_within_bounds_of_undesirable_answers_only():
    p = np.array([0.0, 0.2, 0.5, 0.8, 0.95, 1.0], np.float32)
    no = np.zeros(6, bool)
    np.testing.assert_allclose(unpaired.density_ratio(p, no), [0.5, 0.5, 1.0, 4.0, 10.0, 10.0], rtol=1e-5)
    np.testing.assert_allclose(
        unpaired.density_ratio(p, no, smallest=0.1, largest=3.0), [0.1, 0.25, 1, 3, 3, 3], rtol=1e-5
    )
    np.testing.assert_array_equal(unpaired.density_ratio(p, ~no), 1)


def test_weighted_undesirable_prompts_have_the_mean_of_desirable_ones():
    """Three kinds of prompts; the share of desirable answers to each is what a perfect classifier says."""
    good, bad = np.array([0.6, 0.3, 0.1]), np.array([0.25, 0.25, 0.5])  # densities of the kinds
    p = (good / (good + bad)).astype(np.float32)
    ratio = unpaired.density_ratio(p, np.zeros(3, bool), smallest=0.01)
    np.testing.assert_allclose(bad * ratio, good, rtol=1e-5)


# ---- bad input


@pytest.mark.parametrize("fn", [unpaired.kto, unpaired.bco])
@pytest.mark.parametrize("labels", [np.array([1, -1, 1, -1, 1]), np.ones(5, np.float32)], ids=["signs", "floats"])
def test_labels_that_are_no_verdicts_are_refused(fn, labels):
    with pytest.raises(ValueError, match="desirable must be of type bool"):
        fn(LOGPS, REF_LOGPS, labels, 0.0)


def test_a_kl_a_row_is_refused():
    with pytest.raises(ValueError, match=r"kl has shape \(5,\), expected \[\]"):
        unpaired.kto(LOGPS, REF_LOGPS, DESIRABLE, np.zeros(5, np.float32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: unpaired.kto(LOGPS, REF_LOGPS, DESIRABLE, 0.0, desirable_weight=-1.0), "desirable_weight must be in"),
        (lambda: unpaired.kto(LOGPS, REF_LOGPS, DESIRABLE, 0.0, undesirable_weight=-1.0), "undesirable_weight must"),
        (lambda: unpaired.kto(LOGPS, REF_LOGPS, DESIRABLE, 0.0, beta=0.0), "beta must be above 0"),
        (lambda: unpaired.bco(LOGPS, REF_LOGPS, DESIRABLE, 0.0, beta=-1.0), "beta must be above 0"),
        (lambda: unpaired.density_ratio(LOGPS, DESIRABLE, smallest=0.0), "smallest must be above 0"),
        (lambda: unpaired.MovingMidpoint().update(REWARDS, GOOD, REAL, decay=1.0), r"decay must be in \[0.0, 1.0\)"),
        (lambda: unpaired.MovingMidpoint().update(REWARDS, GOOD[:3], REAL), r"desirable has shape \(3,\)"),
        (lambda: unpaired.RunningMean().update(REWARDS, REAL[:3]), r"rows has shape \(3,\)"),
    ],
)
def test_bad_input_gets_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
