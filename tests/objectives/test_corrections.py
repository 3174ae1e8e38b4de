import jax
import numpy as np
import pytest
from hypothesis import given
from objective_batches import BATCH, MASK, batches, rows_of

from pt_jax import divergences, weights
from pt_jax.objectives import corrections, sequence

RATIO = {
    "token_ratio": np.exp,
    "sequence_ratio": lambda gap: np.full(len(gap), np.exp(gap.sum())),
    "geometric_ratio": lambda gap: np.full(len(gap), np.exp(gap.mean())),
}
FAST = {name: jax.jit(getattr(corrections, name)) for name in RATIO}
KEEP = jax.jit(corrections.off_policy_sequence_mask)


@pytest.mark.parametrize("name", [*RATIO])
@given(batch=batches())
def test_the_ratio_of_trainer_and_sampler(name, batch):
    expected = np.zeros(batch[3].shape)
    for i, t, gap, _ in rows_of(*batch):
        expected[i, t] = RATIO[name](gap)
    np.testing.assert_allclose(FAST[name](batch[0], batch[1], batch[3]), expected, rtol=1e-4)


@pytest.mark.parametrize("name", [*RATIO])
def test_a_token_whose_probability_the_sampler_did_not_say_is_not_corrected(name):
    old_logps, mask = np.log(np.full((1, 3), 0.5, np.float32)), np.ones((1, 3), bool)
    silent = np.log(np.float32([[0.25, np.nan, 0.25]]))
    same = np.where(np.isnan(silent), old_logps, silent)
    np.testing.assert_array_equal(FAST[name](old_logps, silent, mask), FAST[name](old_logps, same, mask))
    if name == "token_ratio":
        assert FAST[name](old_logps, silent, mask)[0, 1] == 1


@pytest.mark.parametrize("name", [*RATIO])
def test_no_gradient_flows_through_a_correction(name):
    silent = np.where(np.arange(5) == 1, np.nan, BATCH[1]).astype(np.float32)
    for of in (0, 1):
        total = lambda *x: corrections.truncated(FAST[name](*x, MASK), MASK).sum()
        np.testing.assert_array_equal(jax.grad(total, of)(BATCH[0], silent), 0)


@pytest.mark.parametrize("name", [*RATIO])
def test_one_program_for_sampler_and_trainer_needs_no_correction(name):
    for treatment in (corrections.truncated, corrections.within):
        got = treatment(FAST[name](BATCH[1], BATCH[1], MASK), MASK)
        np.testing.assert_array_equal(got, MASK.astype(np.float32))


def test_truncation_has_one_bound_and_the_mask_two():
    ratios, mask = np.float32([[0.0, 0.4, 0.5, 1.0, 2.0, 5.0, 5.1, np.inf]]), np.ones((1, 8), bool)
    np.testing.assert_array_equal(corrections.truncated(ratios, mask), np.minimum(ratios, 2))
    np.testing.assert_array_equal(corrections.within(ratios, mask), np.float32([[0, 0, 0.5, 1, 2, 5, 0, 0]]))
    got = corrections.within(ratios, mask, low=0.4, high=1.0)
    np.testing.assert_array_equal(got, np.float32([[0, 0.4, 0.5, 1, 0, 0, 0, 0]]))


def test_a_sequence_mask_takes_out_whole_answers():
    old_logps, mask = np.zeros((2, 3), np.float32), np.array([[True] * 3, [True, True, False]])
    sampler = -np.log(np.float32([[2, 2, 2], [2, 2, 2]]))  # ratio 8 of the one answer, 4 of the other
    got = corrections.within(corrections.sequence_ratio(old_logps, sampler, mask), mask)
    np.testing.assert_allclose(got, [[0, 0, 0], [4, 4, 0]], rtol=1e-5)
    got = corrections.within(corrections.geometric_ratio(old_logps, sampler, mask), mask)
    np.testing.assert_allclose(got, [[2, 2, 2], [2, 2, 0]], rtol=1e-5)


@given(batches(a_row=True))
def test_the_off_policy_mask_takes_out_bad_answers_that_drifted(batch):
    expected = np.zeros(batch[3].shape)
    for i, t, gap, a in rows_of(*batch):
        if abs(-gap.mean() - 0.3) < 1e-5:
            return
        expected[i, t] = not (a[0] < 0 and -gap.mean() > 0.3)
    got = KEEP(batch[0], batch[1], batch[2], batch[3], threshold=0.3)
    np.testing.assert_array_equal(got, expected)


def test_the_off_policy_mask_is_for_bad_answers_that_became_unlikely_alone():
    """Four corners: sign of the advantage, direction of the drift."""
    now, then, mask = np.float32([[-3, -1]] * 4), np.float32([[-1, -1]] * 2 + [[-5, -1]] * 2), np.ones((4, 2), bool)
    advantages = np.float32([[1, 1], [-1, -1]] * 2)
    np.testing.assert_array_equal(KEEP(now, then, advantages, mask), [[1, 1], [0, 0], [1, 1], [1, 1]])
    on_the_line = KEEP(now, then, advantages, mask, threshold=1.0)
    np.testing.assert_array_equal(on_the_line, 1)


def test_a_token_without_sampling_probability_is_no_evidence_of_drift():
    """One NaN must not throw the answer out; it counts in the length."""
    now, bad, mask = np.float32([[-3, -1]]), np.float32([[-1, -1]]), np.ones((1, 2), bool)
    np.testing.assert_array_equal(KEEP(now, np.float32([[-1, np.nan]]), bad, mask, threshold=0.9), 0)
    np.testing.assert_array_equal(KEEP(now, np.float32([[np.nan, np.nan]]), bad, mask, threshold=0.0), 1)


# ---- the KL on samples of an older policy, against enumeration

LOGITS, OLD, REF = np.random.default_rng(3).normal(size=(3, 5)).astype(np.float32)


def expectation(estimate, logits):
    """E over tokens of the old policy of an estimate a token, exactly."""
    logps, old_logps, ref_logps = (jax.nn.log_softmax(x)[:, None] for x in (logits, OLD, REF))
    mask = np.ones((5, 1), bool)
    return weights.weighted_sum(estimate(logps, old_logps, ref_logps, mask), np.exp(old_logps))


def exact(logits, of=jax.nn.log_softmax):
    return (np.exp(1) ** of(logits) * (of(logits) - of(REF))).sum()


def corrected(logps, old_logps, ref_logps, mask):
    return corrections.importance_weighted(divergences.k3(logps, ref_logps, mask), logps, old_logps, mask)


def test_the_importance_weighted_k3_is_the_kl_and_has_its_gradient():
    np.testing.assert_allclose(expectation(corrected, LOGITS), exact(LOGITS), rtol=1e-5)
    got = jax.grad(lambda x: expectation(corrected, x))(LOGITS)
    np.testing.assert_allclose(got, jax.grad(exact)(LOGITS), rtol=1e-4, atol=1e-6)


def test_without_the_ratio_neither_holds_and_with_a_held_ratio_not_the_gradient():
    plain = lambda logps, old_logps, ref_logps, mask: divergences.k3(logps, ref_logps, mask)
    assert abs(expectation(plain, LOGITS) - exact(LOGITS)) > 0.05
    held = lambda logps, old, ref, mask: np.exp(jax.lax.stop_gradient(logps) - old) * divergences.k3(logps, ref, mask)
    np.testing.assert_allclose(expectation(held, LOGITS), exact(LOGITS), rtol=1e-5)
    gap = jax.grad(lambda x: expectation(held, x))(LOGITS) - jax.grad(exact)(LOGITS)
    assert np.abs(gap).max() > 0.05


def test_of_whole_answers_the_ratio_is_gspos():
    ref = np.where(MASK, BATCH[0] + 0.3, np.nan).astype(np.float32)
    kl = divergences.k3(BATCH[0], ref, MASK)
    ratio = sequence.sequence_log_ratio(*BATCH[:2], MASK)
    got = corrections.importance_weighted(kl, ratio, np.zeros_like(ref), MASK)
    expected = np.zeros(MASK.shape)
    for i, t, gap, _ in rows_of(*BATCH):
        expected[i, t] = np.exp(gap.mean()) * (np.exp(0.3) - 1 - 0.3)
    np.testing.assert_allclose(got, expected, rtol=1e-4)


@pytest.mark.parametrize("beta", ["0.1"])
def test_trl_corrects_its_kl_so(trl, beta):
    case = trl(f"grpo/bnpo_beta{beta}")
    inputs, mask = case.inputs, case.inputs.completion_mask.astype(bool)
    kl = divergences.k3(inputs.per_token_logps, inputs.ref_per_token_logps, mask)
    kl = corrections.importance_weighted(kl, inputs.per_token_logps, inputs.old_per_token_logps, mask)
    np.testing.assert_allclose(weights.weighted_sum(kl, weights.token_mean(mask)), case.metrics["kl"], rtol=1e-5)
