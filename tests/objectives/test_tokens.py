import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from objective_batches import BATCH, MASK, batches, compiled, far, rows_of

from pt_jax import logps as token_logps
from pt_jax import weights
from pt_jax.objectives import clipped, soft, tokens

RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=(8, 6)).astype(np.float32)
RAGGED = np.arange(6) < np.array([6, 3, 0, 5, 1, 4, 6, 2])[:, None]
QUANTILE, COVARIANCES = jax.jit(tokens.token_quantile), jax.jit(tokens.covariances)
CLIP_COV, KL_COV = compiled(tokens.clip_cov), compiled(tokens.kl_cov)


# ---- entropy


def test_the_bonus_is_minus_the_entropy_and_its_gradient():
    logits = RNG.normal(size=(8, 6, 4)).astype(np.float32)
    bonus = lambda x: tokens.entropy_bonus(token_logps.token_entropies(x), RAGGED, coef=0.3)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    entropy = np.pad(-(p * np.log(p)).sum(-1), ((0, 0), (1, 0)))[:, :-1]
    np.testing.assert_allclose(bonus(logits), np.where(RAGGED, -0.3 * entropy, 0), rtol=1e-5, atol=1e-6)
    of_row = -(np.log(p) + (-(p * np.log(p)).sum(-1, keepdims=True))) * p  # d entropy / d logits
    expected = np.where(np.pad(RAGGED[:, 1:], ((0, 0), (0, 1)))[..., None], -0.3 * of_row, 0)
    np.testing.assert_allclose(jax.grad(lambda x: bonus(x).sum())(logits), expected, rtol=1e-4, atol=1e-6)


def test_the_bonus_of_a_uniform_distribution_is_log_v():
    """The negative log-likelihood of the token, mistaken for the entropy, is log V here as well; its slope is not 0."""
    logits, mask = np.zeros((1, 2, 7), np.float32), np.array([[False, True]])
    value, gradient = jax.value_and_grad(
        lambda x: tokens.entropy_bonus(token_logps.token_entropies(x), mask, coef=1.0).sum()
    )(logits)
    np.testing.assert_allclose(value, -np.log(7), rtol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-7)


# ---- quantiles


@given(batches(), st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]))
def test_the_threshold_is_the_quantile_of_the_scored_tokens(batch, quantile):
    scores, mask = batch[2], batch[3]
    expected = np.quantile(scores[mask].astype(np.float64), quantile) if mask.any() else np.inf
    np.testing.assert_allclose(QUANTILE(scores, mask, quantile=quantile), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.5, 0.8])
def test_as_many_tokens_are_chosen_as_the_quantile_says(quantile):
    chosen = tokens.at_least(SCORES, QUANTILE(SCORES, RAGGED, quantile=quantile), RAGGED)
    highest = np.sort(SCORES[RAGGED])[::-1][: int(np.floor((1 - quantile) * (RAGGED.sum() - 1))) + 1]
    np.testing.assert_array_equal(np.sort(SCORES[np.asarray(chosen, bool)])[::-1], highest)
    assert not np.asarray(chosen)[~RAGGED].any()


def test_the_highest_quantile_is_the_highest_token_and_all_are_in_the_lowest():
    assert tokens.at_least(SCORES, QUANTILE(SCORES, RAGGED, quantile=1.0), RAGGED).sum() == 1
    assert tokens.at_least(SCORES, QUANTILE(SCORES, RAGGED, quantile=0.0), RAGGED).sum() == RAGGED.sum()


def test_a_threshold_of_the_batch_chooses_the_same_in_every_microbatch():
    """TRL takes the quantile of each microbatch; then the choice depends on who is in it."""
    whole = tokens.at_least(SCORES, QUANTILE(SCORES, RAGGED, quantile=0.8), RAGGED)
    threshold = QUANTILE(SCORES, RAGGED, quantile=0.8)
    parts = [tokens.at_least(SCORES[i::2], threshold, RAGGED[i::2]) for i in range(2)]
    np.testing.assert_array_equal(np.stack(parts, 1).reshape(whole.shape), whole)
    own = [
        tokens.at_least(SCORES[i::2], QUANTILE(SCORES[i::2], RAGGED[i::2], quantile=0.8), RAGGED[i::2]) for i in (0, 1)
    ]
    assert (np.stack(own, 1).reshape(whole.shape) != whole).any()


def test_trl_chooses_the_same_tokens(trl):
    case = trl("grpo_static/high_entropy_mask0.8")
    entropies, mask = case.inputs.entropies, case.inputs.mask.astype(bool)
    chosen = tokens.at_least(entropies, QUANTILE(entropies, mask, quantile=0.8), mask)
    np.testing.assert_array_equal(np.asarray(chosen, bool), case.outputs.mask)


@pytest.mark.parametrize("quantile", [-0.1, 1.1])
def test_a_quantile_out_of_range_is_refused(quantile):
    with pytest.raises(ValueError, match=r"quantile must be in \[0.0, 1"):
        tokens.token_quantile(SCORES, RAGGED, quantile=quantile)


# ---- covariances


@given(batches())
def test_the_covariances_of_the_batch(batch):
    logps, _, advantages, mask = batch
    expected = np.zeros(mask.shape)
    if mask.any():
        x, a = logps[mask].astype(np.float64), advantages[mask].astype(np.float64)
        expected[mask] = (x - x.mean()) * (a - a.mean())
        np.testing.assert_allclose(expected.sum() / mask.sum(), np.cov(np.stack([x, a]), ddof=0)[0, 1], atol=1e-9)
    np.testing.assert_allclose(COVARIANCES(logps, advantages, mask), expected, rtol=1e-4, atol=1e-4)


def test_a_likely_token_of_high_advantage_has_the_highest_covariance():
    logps, advantages = np.float32([[-0.1, -0.1, -5, -5]]), np.float32([[1, -1, 1, -1]])
    cov = COVARIANCES(logps, advantages, np.ones((1, 4), bool))
    np.testing.assert_allclose(cov, [[2.45, -2.45, -2.45, 2.45]], rtol=1e-5)


@given(batches(), st.floats(0.01, 1.0))
def test_clip_cov_takes_its_share_of_all_tokens_from_the_band(batch, share):
    cov, mask = batch[2], batch[3]
    band = ((cov >= 0.3) & (cov <= 2))[mask].sum()
    expected = min(1, share * mask.sum() / band) if band else 0
    got = tokens.clip_cov_rate(cov, mask, share=share, low=0.3, high=2.0)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_clip_cov_chooses_in_the_band_by_the_draws():
    cov = np.float32([[0.9, 1.0, 5.0, 5.1, 3.0, 3.0]])
    draws, mask = np.float32([[0, 0, 0.4, 0, 0.6, 0.2]]), np.array([[True] * 5 + [False]])
    choice = tokens.clip_cov_choice(cov, draws, jnp.float32(0.5), mask)
    np.testing.assert_array_equal(choice, [[0, 1, 1, 0, 0, 0]])


def test_clip_cov_takes_the_share_on_average():
    cov, mask = RNG.uniform(0, 3, (40, 50)).astype(np.float32), np.ones((40, 50), bool)
    draws = jax.random.uniform(jax.random.key(0), (40, 50))
    choice = tokens.clip_cov_choice(cov, draws, tokens.clip_cov_rate(cov, mask, share=0.2), mask)
    np.testing.assert_allclose(choice.mean(), 0.2, atol=0.03)  # three standard deviations


PICKED = np.array([[1, 0, 1, 0, 1], [1] * 5, [0, 1, 1, 0, 0]], bool)


def test_clip_cov_is_the_surrogate_without_the_gradient_of_the_picked_tokens():
    surrogate, slope = compiled(clipped.clipped_surrogate)(*BATCH, clip_high=0.3)
    for picked in (PICKED, PICKED.astype(np.float32)):
        loss, gradient = CLIP_COV(*BATCH[:3], picked, MASK, clip_high=0.3)
        np.testing.assert_allclose(loss, surrogate, rtol=1e-6)
        np.testing.assert_allclose(gradient, np.where(PICKED, 0, slope), rtol=1e-6)
    assert (np.asarray(slope)[PICKED & MASK] != 0).any()


@given(batches())
def test_the_equation_of_kl_cov(batch):
    loss, slope = (np.zeros(batch[3].shape) for _ in range(2))
    picked = np.indices(batch[3].shape).sum(0) % 2 == 0
    for i, t, log_ratio, a in rows_of(*batch):
        beta = 0.7 * picked[i, t]
        loss[i, t] = -np.exp(log_ratio) * a + beta * np.abs(log_ratio)
        slope[i, t] = -np.exp(log_ratio) * a + beta * np.sign(log_ratio)
    for got, expected in zip(KL_COV(*batch[:3], picked, batch[3], beta=0.7), (loss, slope)):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)


def test_kl_cov_without_picked_tokens_is_the_unclipped_surrogate():
    np.testing.assert_array_equal(
        tokens.kl_cov(*BATCH[:3], np.zeros_like(MASK), MASK), soft.unclipped_surrogate(*BATCH)
    )


@pytest.mark.parametrize("gap", [50.0, -50.0])
def test_a_ratio_far_away_has_finite_loss_and_gradient(gap):
    x, old, a, mask = far(gap, -1.0)
    for fn in (CLIP_COV, KL_COV):
        loss, slope = fn(x, old, a, np.array([[True, False]]), mask)
        assert np.isfinite(loss).all() and np.isfinite(slope).all()


def test_what_is_left_out_still_counts_in_the_mean():
    """Wang et al. divide by all tokens: leaving out tokens makes the loss smaller, not another mean."""
    chosen = tokens.at_least(SCORES, QUANTILE(SCORES, RAGGED), RAGGED)
    got = weights.weighted_sum(chosen * 1.0, weights.token_mean(RAGGED))
    np.testing.assert_allclose(got, np.asarray(chosen).sum() / RAGGED.sum(), rtol=1e-6)
