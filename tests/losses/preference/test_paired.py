import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st

from pt_jax import logps, weights
from pt_jax.losses import likelihood, preference

# Sums over answers of very different lengths; the policy likes the chosen one more, less, and as much.
CHOSEN = np.array([-35.2, -7.1, -120.35, -0.01], np.float32)
REJECTED = np.array([-41.0, -3.3, -88.8, -12.0], np.float32)
REF_CHOSEN = np.array([-38.0, -6.0, -120.35, -4.0], np.float32)
REF_REJECTED = np.array([-40.3, -6.3, -88.8, -11.0], np.float32)
PAIRS = (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)


def by_the_equation(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, label_smoothing=0.0):
    """In float64. -log sigmoid(h) is log(1 + exp(-h)), written so that exp does not overflow."""
    f = np.float64
    h = beta * ((f(chosen) - f(ref_chosen)) - (f(rejected) - f(ref_rejected)))
    return (1 - label_smoothing) * np.logaddexp(0, -h) + label_smoothing * np.logaddexp(0, h)


class DpoTest(parameterized.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    @parameterized.parameters((0.1, 0.0), (0.5, 0.1), (2.0, 0.49))
    def test_the_equation(self, beta, label_smoothing):
        got = self.variant(preference.dpo)(*PAIRS, beta=beta, label_smoothing=label_smoothing)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, by_the_equation(*PAIRS, beta, label_smoothing), rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    @parameterized.parameters(0.1, 0.5)
    def test_a_policy_that_is_the_reference_pays_log_two(self, beta):
        got = self.variant(preference.dpo)(CHOSEN, REJECTED, CHOSEN, REJECTED, beta=beta)
        np.testing.assert_allclose(got, np.log(2), rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_an_implicit_reward_is_beta_times_the_log_ratio(self):
        got = self.variant(preference.implicit_reward)(CHOSEN, REF_CHOSEN, beta=0.5)
        np.testing.assert_allclose(got, 0.5 * (CHOSEN.astype(np.float64) - REF_CHOSEN), rtol=1e-5)


DPO = jax.jit(preference.dpo)
SLOPES = jax.jit(jax.grad(lambda *x: preference.dpo(*x[:4], beta=x[4], label_smoothing=x[5]).sum(), (0, 1, 2, 3)))


@given(st.data())
def test_the_equation_and_its_gradient_hold_for_any_pair(data):
    number = st.floats(-50, 0, width=32)
    pairs = np.array(data.draw(st.lists(number, min_size=8, max_size=8)), np.float32).reshape(4, 2)
    beta = data.draw(st.floats(0.015625, 2, width=32))
    s = data.draw(st.sampled_from([0.0, 0.1, 0.49]))
    np.testing.assert_allclose(
        DPO(*pairs, beta=beta, label_smoothing=s), by_the_equation(*pairs, beta, s), rtol=1e-4, atol=1e-6
    )
    h = beta * (pairs[0] - pairs[2] - pairs[1] + pairs[3]).astype(np.float64)
    slope = beta * (1 / (1 + np.exp(-h)) - (1 - s))  # d loss / d chosen = beta (sigmoid(h) - (1 - s))
    for got, sign in zip(SLOPES(*pairs, beta, s), (1, -1, -1, 1)):
        np.testing.assert_allclose(got, sign * slope, rtol=1e-4, atol=1e-5)


def test_descent_raises_the_chosen_and_lowers_the_rejected():
    chosen, rejected, *_ = SLOPES(*PAIRS, 0.1, 0.0)
    assert (chosen < 0).all() and (rejected > 0).all()


def test_the_two_answers_are_not_interchangeable():
    swapped = preference.dpo(REJECTED, CHOSEN, REF_REJECTED, REF_CHOSEN)
    h = by_the_equation(*PAIRS)
    # log(1 + e^h) - log(1 + e^-h) = h: exchanging the answers costs the margin that they had
    margin = 0.1 * ((CHOSEN - REF_CHOSEN) - (REJECTED - REF_REJECTED))
    np.testing.assert_allclose(swapped - h, margin, rtol=1e-4, atol=1e-5)


def test_the_sum_of_two_implicit_rewards_is_the_margin_of_dpo():
    """What is logged as rewards/margins is what the loss is a function of."""
    margin = preference.implicit_reward(CHOSEN, REF_CHOSEN) - preference.implicit_reward(REJECTED, REF_REJECTED)
    np.testing.assert_allclose(preference.dpo(*PAIRS), -jax.nn.log_sigmoid(margin), rtol=1e-6)


@pytest.mark.parametrize("prompt", [-300.0, 55.5])
def test_a_term_of_the_prompt_cancels(prompt):
    shifted = preference.dpo(CHOSEN + np.float32(prompt), REJECTED + np.float32(prompt), REF_CHOSEN, REF_REJECTED)
    np.testing.assert_allclose(shifted, preference.dpo(*PAIRS), rtol=1e-4)


def test_label_smoothing_stops_a_margin_from_growing_for_ever():
    """The loss has its minimum where sigmoid(h) = 1 - s, so a margin above that is pulled back."""
    at = lambda h, s: jax.grad(lambda x: preference.dpo(x, *[jnp.zeros(1)] * 3, beta=1.0, label_smoothing=s)[0])(
        jnp.full(1, h)
    )
    best = np.log(0.9 / 0.1)
    np.testing.assert_allclose(at(best, 0.1), 0, atol=1e-6)
    assert at(best + 1, 0.1) > 0 > at(best + 1, 0.0)


@pytest.mark.parametrize("far", [1e4, -1e4])
def test_far_margins_stay_finite(far):
    zeros = np.zeros(1, np.float32)
    far = np.full(1, far, np.float32)
    np.testing.assert_allclose(preference.dpo(far, zeros, zeros, zeros, beta=1.0), max(-far[0], 0))
    np.testing.assert_allclose(SLOPES(far, zeros, zeros, zeros, 1.0, 0.0)[0], -float(far[0] < 0))


@pytest.mark.parametrize(
    ("hyperparameters", "message"),
    [
        ({"beta": 0.0}, "beta must be above 0, got 0.0"),
        ({"beta": -0.1}, "beta must be above 0, got -0.1"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0.0, 0.5\), got 0.5"),
        ({"label_smoothing": -0.1}, r"label_smoothing must be in \[0.0, 0.5\), got -0.1"),
    ],
)
def test_a_number_out_of_range_is_refused(hyperparameters, message):
    with pytest.raises(ValueError, match=message):
        preference.dpo(*PAIRS, **hyperparameters)


@pytest.mark.parametrize("at", range(1, 4))
def test_a_wrong_shape_is_told(at):
    pairs = list(PAIRS)
    pairs[at] = pairs[at][:3]
    name = ["chosen", "rejected", "ref_chosen", "ref_rejected"][at]
    with pytest.raises(ValueError, match=rf"{name} has shape \(3,\), expected \[B\] with B=4 \(from chosen\)"):
        preference.dpo(*pairs)


def test_logps_that_were_not_summed_are_refused():
    with pytest.raises(ValueError, match=r"chosen has shape \(4, 1\), expected \[B\]"):
        preference.dpo(*(x[:, None] for x in PAIRS))


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_trl_computes_the_same_dpo(trl, beta):
    case = trl(f"dpo/sigmoid/beta{beta}")
    mask = case.inputs.completion_mask[:, 1:].astype(bool)  # TRL's mask stands on the token, its logps one before
    half = len(mask) // 2

    def mean(x):
        sums, ref_sums = logps.sequence_logps(x, mask), logps.sequence_logps(case.inputs.ref_per_token_logps, mask)
        pairs = sums[:half], sums[half:], ref_sums[:half], ref_sums[half:]
        rewards = [preference.implicit_reward(*pairs[i::2], beta=beta).mean() for i in (0, 1)]
        loss = weights.weighted_sum(preference.dpo(*pairs, beta=beta), weights.row_mean(jnp.ones(half, bool)))
        return loss, (*rewards, pairs[0].mean(), pairs[1].mean())

    (loss, metrics), slopes = jax.jit(jax.value_and_grad(mean, has_aux=True))(case.inputs.per_token_logps)
    np.testing.assert_allclose(loss, case.outputs.loss, rtol=1e-5)
    # TRL is handed zeros where nothing is scored and sums them too, so its slope there means nothing
    np.testing.assert_allclose(slopes[mask], case.outputs.grad_logps[mask], rtol=1e-5)
    np.testing.assert_array_equal(slopes[~mask], 0)
    names = ["rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"]
    np.testing.assert_allclose(metrics, [case.metrics[name] for name in names], rtol=1e-5)


def test_trl_computes_the_same_from_logits_with_smoothed_labels(trl):
    """CPO is DPO with a reference of 0, beside the likelihood of the chosen answers."""
    case = trl("cpo/full/label_smoothing0.1")
    tokens = np.concatenate([case.inputs.chosen_input_ids, case.inputs.rejected_input_ids])
    mask = np.concatenate([case.inputs.chosen_labels, case.inputs.rejected_labels]) != -100
    half = len(tokens) // 2
    hyperparameters = {"beta": case.options.beta, "label_smoothing": case.options.label_smoothing}

    def total(logits):
        x = logps.token_logps(logits, tokens)
        sums = logps.sequence_logps(x, mask)
        zeros = jnp.zeros(half)
        pairs = preference.dpo(sums[:half], sums[half:], zeros, zeros, **hyperparameters)
        nll = likelihood.nll(x[:half], mask[:half])
        nll = weights.weighted_sum(nll, weights.token_mean(mask[:half]))
        return pairs.mean() + case.options.cpo_alpha * nll, (sums[:half].mean(), sums[half:].mean(), nll)

    (loss, metrics), slopes = jax.jit(jax.value_and_grad(total, has_aux=True))(case.inputs.logits)
    np.testing.assert_allclose(loss, case.outputs.loss, rtol=1e-5)
    np.testing.assert_allclose(slopes, case.outputs.grad_logits, rtol=1e-5, atol=1e-7)
    names = ["logps/chosen", "logps/rejected", "nll_loss"]
    np.testing.assert_allclose(metrics, [case.metrics[name] for name in names], rtol=1e-5)
