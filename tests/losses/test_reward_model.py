import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pt_jax import weights
from pt_jax.losses import reward_model

CHOSEN = np.array([1.5, -0.3, 4.0, 0.2], np.float32)
REJECTED = np.array([0.5, 0.7, -1.0, 0.2], np.float32)
MARGINS = np.array([0.0, 0.5, 2.0, 1.0], np.float32)

BT, MARGIN, CENTRING = map(
    jax.jit, (reward_model.bradley_terry, reward_model.bradley_terry_margin, reward_model.centring)
)


def surprise(h):
    """-log sigmoid(h), in float64."""
    return np.logaddexp(0, -np.float64(h))


def rows(data, low, high):
    return np.array(data.draw(st.lists(st.floats(low, high, width=32), min_size=4, max_size=4)), np.float32)


# ---- Bradley-Terry


@given(st.data())
def test_the_equations(data):
    chosen, rejected, margins = rows(data, -30, 30), rows(data, -30, 30), rows(data, 0, 4)
    c, r, m = (np.float64(x) for x in (chosen, rejected, margins))
    np.testing.assert_allclose(BT(chosen, rejected), surprise(c - r), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(MARGIN(chosen, rejected, margins), surprise(c - r - m), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(CENTRING(chosen, rejected, coefficient=0.3), 0.3 * (c + r) ** 2, rtol=1e-4, atol=1e-5)


def test_the_gradients_are_the_slopes_and_none_goes_into_the_margins(slope):
    def total(chosen, rejected, margins):
        loss = reward_model.bradley_terry_margin(chosen, rejected, margins)
        return (loss + reward_model.centring(chosen, rejected)).sum()

    got = jax.grad(total, (0, 1, 2))(CHOSEN, REJECTED, MARGINS)
    exact = lambda c, r: (surprise(c - r - MARGINS) + 0.01 * (c + r) ** 2).sum()
    np.testing.assert_allclose(got[0], slope(lambda c: exact(c, np.float64(REJECTED)), CHOSEN), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got[1], slope(lambda r: exact(np.float64(CHOSEN), r), REJECTED), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(got[2], 0)


def test_a_margin_of_zero_is_none():
    np.testing.assert_array_equal(MARGIN(CHOSEN, REJECTED, np.zeros(4, np.float32)), BT(CHOSEN, REJECTED))


def test_a_margin_asks_for_more():
    assert (MARGIN(CHOSEN, REJECTED, MARGINS)[1:] > BT(CHOSEN, REJECTED)[1:]).all()


def test_only_centring_sees_what_a_prompt_adds_to_both_rewards():
    np.testing.assert_allclose(BT(CHOSEN + 8, REJECTED + 8), BT(CHOSEN, REJECTED), rtol=1e-5)
    assert (CENTRING(CHOSEN + 8, REJECTED + 8) > CENTRING(CHOSEN, REJECTED)).all()


def test_centring_leaves_the_difference_of_a_pair_alone():
    """Its pull on both rewards is the same, and is none where their sum is 0."""
    slopes = jax.grad(lambda *x: reward_model.centring(*x).sum(), (0, 1))(CHOSEN, REJECTED)
    np.testing.assert_array_equal(*slopes)
    np.testing.assert_array_equal(CENTRING(CHOSEN, -CHOSEN), 0)


@pytest.mark.parametrize("far", [1e4, -1e4])
def test_far_rewards_stay_finite(far):
    zeros, far = np.zeros(4, np.float32), np.full(4, far, np.float32)
    np.testing.assert_allclose(BT(far, zeros), np.maximum(-far, 0))
    slopes = jax.grad(lambda x: reward_model.bradley_terry(x, zeros).sum())(far)
    np.testing.assert_allclose(slopes, -(far < 0).astype(np.float32))


def test_pairs_that_fill_the_batch_change_nothing():
    filled = [np.append(x, [100.0, -100.0]).astype(np.float32) for x in (CHOSEN, REJECTED)]
    mean = lambda pairs, real: weights.weighted_sum(reward_model.bradley_terry(*pairs), weights.row_mean(real))
    np.testing.assert_allclose(mean(filled, np.arange(6) < 4), mean((CHOSEN, REJECTED), np.ones(4, bool)), rtol=1e-6)


def test_accuracy_counts_a_tie_as_a_miss():
    np.testing.assert_array_equal(reward_model.reward_accuracy(CHOSEN, REJECTED), [1, 0, 1, 0])


# ---- process reward

MASK = np.array([[0, 0, 1, 0, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]], bool)  # ends of steps; a row without any
LABELS = np.array([[0, 0, 1, 1, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 1]], bool)
PROCESS = jax.jit(reward_model.process_reward)
PROCESS_SLOPE = jax.jit(jax.grad(lambda *x: reward_model.process_reward(*x).sum()))


@given(st.data())
def test_the_equation_of_the_process_reward(data):
    draw = lambda values: np.array(data.draw(st.lists(values, min_size=15, max_size=15))).reshape(3, 5)
    z, mask = draw(st.floats(-30, 30, width=32)).astype(np.float32), draw(st.booleans())
    y = draw(st.sampled_from([0.0, 0.25, 1.0])).astype(np.float32)
    expected = np.where(mask, y * surprise(z) + (1 - y) * surprise(-z), 0)
    hidden = [np.where(mask, x, np.float32(np.nan)) for x in (z, y)]
    np.testing.assert_allclose(PROCESS(*hidden, mask), expected, rtol=1e-4, atol=1e-6)
    slopes = np.where(mask, 1 / (1 + np.exp(-np.float64(z))) - y, 0)  # sigmoid(z) - y
    np.testing.assert_allclose(PROCESS_SLOPE(*hidden, mask), slopes, rtol=1e-4, atol=1e-6)


def test_labels_are_verdicts_or_shares():
    z = np.linspace(-2, 2, 15, dtype=np.float32).reshape(3, 5)
    np.testing.assert_array_equal(PROCESS(z, LABELS, MASK), PROCESS(z, LABELS.astype(np.float32), MASK))
    np.testing.assert_array_equal(PROCESS(z, LABELS, MASK), PROCESS(z, LABELS.astype(np.int32), MASK))


def test_a_model_with_two_outputs_has_their_difference_as_its_logit():
    both = np.random.default_rng(0).normal(size=(3, 5, 2)).astype(np.float32)
    expected = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(both), LABELS.astype(np.int32))
    got = PROCESS(both[..., 1] - both[..., 0], LABELS, MASK)
    np.testing.assert_allclose(got, np.where(MASK, expected, 0), rtol=1e-5)


def test_a_reward_model_that_knows_nothing_pays_log_two_a_step():
    got = PROCESS(np.zeros((3, 5), np.float32), LABELS, MASK)
    np.testing.assert_allclose(got, np.where(MASK, np.log(2), 0), rtol=1e-6)


# ---- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reward_model.bradley_terry(CHOSEN, REJECTED[:3]), r"rejected_rewards has shape \(3,\)"),
        (lambda: reward_model.bradley_terry_margin(CHOSEN, REJECTED, 1.0), r"margins has shape \(\)"),
        (lambda: reward_model.bradley_terry(CHOSEN[:, None], REJECTED[:, None]), r"chosen_rewards has shape \(4, 1\)"),
        (lambda: reward_model.centring(CHOSEN, REJECTED, coefficient=-0.1), "coefficient must be in"),
        (lambda: reward_model.process_reward(MASK * 1.0, LABELS[:, :4], MASK), r"step_labels has shape \(3, 4\)"),
        (lambda: reward_model.process_reward(MASK * 1, LABELS, MASK), "step_logits must be of a float type"),
    ],
)
def test_bad_input_gets_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
