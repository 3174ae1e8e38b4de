"""Which tokens teach: the entropy bonus, the tokens of high entropy, and those whose update costs most entropy.

The last two choose tokens by their rank in the batch. A rank is a matter of the whole batch, so it comes in two steps:
one number is computed once over the batch, before it is dealt to microbatches and devices (``token_quantile``,
``clip_cov_rate``), and a choice a token is made by it (``at_least``, ``clip_cov_choice``), as float32 of 0 and 1.

    beyond the 80/20 rule    ``at_least(entropies, token_quantile(entropies, mask, quantile=0.8), mask) * loss``
    KL-Cov                   ``kl_cov(..., at_least(cov, token_quantile(cov, mask, quantile=0.998), mask), mask)``
    Clip-Cov                 ``clip_cov(..., clip_cov_choice(cov, draws, clip_cov_rate(cov, mask), mask), mask)``

with ``cov = covariances(logps, advantages, mask)``. In all of them the weights are those of the whole mask: a token
that is left out still counts in the mean.
"""

import math

import jax
import jax.numpy as jnp

from pt_jax import checks, weights
from pt_jax.objectives import clipped


def entropy_bonus(entropies, mask, *, coef=0.01):
    """What keeps a policy from becoming certain too early, as a loss.

        loss = -coef H,   H = -sum_v p_v log p_v

    Williams and Peng 1991, https://doi.org/10.1080/09540099108946587; Mnih et al. 2016, https://arxiv.org/abs/1602.01783,
    section 4.

    Args:
      entropies: [B, T] of the distributions that the tokens were sampled from, in nats, with their gradient:
        ``logps.token_entropies``, not minus the log-probability of the token.
      mask: [B, T] bool, the scored tokens.
      coef: >= 0.

    Returns:
      [B, T] float32; 0 where not scored.

    Raises:
      ValueError: the shapes disagree, or coef is out of range.

    >>> print(entropy_bonus(jnp.array([[1.0, 2.0]]), jnp.array([[True, False]])))
    [[-0.01 0. ]]
    """
    (entropies,) = weights.scored(mask, entropies=entropies)
    checks.between("coef", coef, 0.0, float("inf"))
    return 0 - coef * entropies


def token_quantile(token_scores, mask, *, quantile=0.8):
    """The number that a share of the batch's tokens lies below; linear between two tokens. Of the whole batch.

        threshold = the quantile of {score_it : mask_it}

    With entropies and 0.8 it is what Wang et al. 2025, https://arxiv.org/abs/2506.01939, call tau: the 20% of the
    tokens with the highest entropy are trained on.

    Args:
      token_scores: [B, T], entropies or covariances; no gradient flows through it.
      mask: [B, T] bool, the scored tokens.
      quantile: in [0, 1].

    Returns:
      A scalar, float32; infinite where nothing is scored.

    Raises:
      ValueError: the shapes disagree, or quantile is out of range.

    >>> print(token_quantile(jnp.array([[3.0, 1.0, 2.0, 9.0]]), jnp.array([[True, True, True, False]]), quantile=0.75))
    2.5
    """
    (token_scores,) = weights.scored(mask, token_scores=token_scores)
    checks.between("quantile", quantile, 0.0, math.nextafter(1.0, 2.0))
    mask = jnp.asarray(mask, bool)
    known = jnp.where(mask, jax.lax.stop_gradient(token_scores), jnp.nan)
    return jnp.where(mask.any(), jnp.nanquantile(known, quantile), jnp.inf).astype(token_scores.dtype)


def at_least(token_scores, threshold, mask):
    """The tokens from a threshold upwards.

        choice = [score >= threshold]

    Wang et al. 2025, https://arxiv.org/abs/2506.01939, with entropies; Cui et al. 2025,
    https://arxiv.org/abs/2505.22617, with covariances.

    Args:
      token_scores: [B, T], entropies or covariances.
      threshold: a scalar, of ``token_quantile`` over the whole batch.
      mask: [B, T] bool, the scored tokens.

    Returns:
      [B, T] float32 of 0 and 1; 0 where not scored.

    >>> print(at_least(jnp.array([[3.0, 1.0, 2.0]]), jnp.array(2.0), jnp.ones((1, 3), bool)))
    [[1. 0. 1.]]
    """
    (token_scores,) = weights.scored(mask, token_scores=token_scores)
    checks.shapes(threshold=(threshold, ""))
    return jnp.where(mask, token_scores >= threshold, False).astype(token_scores.dtype)


def covariances(logps, advantages, mask):
    """What a token adds to the covariance of log-probability and advantage in the batch. Of the whole batch.

        cov_it = (logps_it - mean(logps)) (A_it - mean(A)),   means over the scored tokens of the batch

    A likely token of high advantage, or an unlikely one of low, makes the policy more certain when it is trained on:
    the larger cov, the more entropy it costs.

    Cui et al. 2025, https://arxiv.org/abs/2505.22617, section 4.

    Args:
      logps: [B, T] of the tokens under the policy being trained, in nats.
      advantages: [B, T].
      mask: [B, T] bool, the scored tokens.

    Returns:
      [B, T] float32; 0 where not scored. No gradient flows through it.

    >>> print(covariances(jnp.array([[-1.0, -3.0]]), jnp.array([[1.0, 0.0]]), jnp.ones((1, 2), bool)))
    [[0.5 0.5]]
    """
    logps, advantages = weights.scored(mask, logps=logps, advantages=advantages)
    count = jnp.maximum(jnp.asarray(mask, bool).sum(), 1)
    logps, advantages = jax.lax.stop_gradient((logps, advantages))
    return jnp.where(mask, (logps - logps.sum() / count) * (advantages - advantages.sum() / count), 0)


def clip_cov_rate(covariances, mask, *, share=2e-4, low=1.0, high=5.0):
    """With which probability Clip-Cov takes a token of its band, so that it takes a share of all. Of the whole batch.

        rate = min(1, share N / N_band),   N_band = tokens with low <= cov <= high

    Cui et al. 2025, https://arxiv.org/abs/2505.22617, section 4, where exactly floor(share N) tokens are drawn from
    the band; here each is drawn by itself, so that a token's fate does not depend on which device the others are on.

    Args:
      covariances: [B, T] of ``covariances``.
      mask: [B, T] bool, the scored tokens; N is their number.
      share: > 0, of the tokens of the batch.
      low, high: the band, in nats times advantage, far above the mean of the covariances.

    Returns:
      A scalar in [0, 1], float32; 0 where the band is empty.

    Raises:
      ValueError: the shapes disagree, or a number is not above 0.

    >>> cov = jnp.array([[0.0, 2.0, 3.0, 9.0]])
    >>> print(clip_cov_rate(cov, jnp.ones((1, 4), bool), share=0.25))  # one of four, from a band of two
    0.5
    """
    (covariances,) = weights.scored(mask, covariances=covariances)
    for name, x in {"share": share, "low": low, "high": high}.items():
        checks.positive(name, x)
    mask = jnp.asarray(mask, bool)
    band = (mask & (low <= covariances) & (covariances <= high)).sum()
    rate = jnp.minimum(share * mask.sum() / jnp.maximum(band, 1), 1)
    return jnp.where(band > 0, rate, 0).astype(covariances.dtype)


def clip_cov_choice(covariances, draws, rate, mask, *, low=1.0, high=5.0):
    """The tokens whose gradient Clip-Cov takes away: some of the band, drawn at random.

        choice = [low <= cov <= high and draw < rate]

    Cui et al. 2025, https://arxiv.org/abs/2505.22617, section 4.

    Args:
      covariances: [B, T] of ``covariances``.
      draws: [B, T], uniform in [0, 1), of ``jax.random.uniform``.
      rate: a scalar, of ``clip_cov_rate`` over the whole batch.
      mask: [B, T] bool, the scored tokens.
      low, high: as in ``clip_cov_rate``.

    Returns:
      [B, T] float32 of 0 and 1; 0 where not scored.

    Raises:
      ValueError: the shapes disagree, or a number is not above 0.

    >>> cov, draws = jnp.array([[0.0, 2.0, 3.0]]), jnp.array([[0.1, 0.9, 0.2]])
    >>> print(clip_cov_choice(cov, draws, jnp.array(0.5), jnp.ones((1, 3), bool)))
    [[0. 0. 1.]]
    """
    covariances, draws = weights.scored(mask, covariances=covariances, draws=draws)
    checks.shapes(rate=(rate, ""))
    for name, x in {"low": low, "high": high}.items():
        checks.positive(name, x)
    choice = (low <= covariances) & (covariances <= high) & (draws < rate)
    return jnp.where(mask, choice, False).astype(covariances.dtype)


def clip_cov(logps, old_logps, advantages, picked, mask, *, clip_low=0.2, clip_high=0.2):
    """The clipped surrogate, without a gradient for the picked tokens.

        loss = sg(clipped surrogate) for picked tokens, clipped surrogate for the others

    sg holds its argument constant. Cui et al. 2025 (Clip-Cov), https://arxiv.org/abs/2505.22617, section 4.

    Args:
      logps, old_logps, advantages, mask, clip_low, clip_high: as in ``clipped.clipped_surrogate``.
      picked: [B, T] bool or 0 and 1, of ``clip_cov_choice``.

    Returns:
      [B, T] float32; 0 where not scored.

    Raises:
      ValueError: the shapes disagree, or a number is out of range.

    >>> slope = jax.grad(lambda x: clip_cov(x, x, jnp.ones((1, 2)), jnp.array([[1, 0]]), jnp.ones((1, 2), bool)).sum())
    >>> print(slope(jnp.zeros((1, 2))))
    [[ 0. -1.]]
    """
    checks.shapes(logps=(logps, "B T"), picked=(picked, "B T"))
    logps = jnp.where(jnp.asarray(picked) != 0, jax.lax.stop_gradient(logps), logps)
    bounds = {"clip_low": clip_low, "clip_high": clip_high}
    return clipped.clipped_surrogate(logps, old_logps, advantages, mask, **bounds)


def kl_cov(logps, old_logps, advantages, picked, mask, *, beta=1.0):
    """The unclipped surrogate, with a penalty on the distance to the old policy for the picked tokens.

        loss = -ratio A + beta |log p - log p_old| picked,   ratio = exp(logps - old_logps)

    Cui et al. 2025 (KL-Cov), https://arxiv.org/abs/2505.22617, section 4; of the sampled token's KL they take
    the absolute log-ratio. Its gradient is 0 on the first update after sampling and of constant size afterwards.

    Args:
      logps: [B, T] of the tokens under the policy being trained, in nats.
      old_logps: [B, T] under the policy that sampled them; no gradient flows into it.
      advantages: [B, T]; no gradient flows into it.
      picked: [B, T] bool or 0 and 1, the tokens of largest covariance: ``at_least`` of the 0.998 quantile, say.
      mask: [B, T] bool, the scored tokens.
      beta: >= 0.

    Returns:
      [B, T] float32; 0 where not scored.

    Raises:
      ValueError: the shapes disagree, or beta is out of range.

    >>> logps, A, picked = jnp.log(jnp.array([[2.0, 2.0]])), jnp.ones((1, 2)), jnp.array([[1, 0]])
    >>> print(kl_cov(logps, jnp.zeros((1, 2)), A, picked, jnp.ones((1, 2), bool)).round(4))  # log 2 - 2
    [[-1.3069 -2. ]]
    """
    checks.shapes(logps=(logps, "B T"), picked=(picked, "B T"))
    checks.between("beta", beta, 0.0, float("inf"))
    logps, old_logps, advantages = weights.scored(mask, logps=logps, old_logps=old_logps, advantages=advantages)
    log_ratio, advantages = (
        weights.log_ratio(logps, jax.lax.stop_gradient(old_logps)),
        jax.lax.stop_gradient(advantages),
    )
    # |x|, with the slope 0 at 0: jnp.abs has 1 there, which would push down every token of the first update
    distance = log_ratio * jnp.sign(jax.lax.stop_gradient(log_ratio))
    penalty = jnp.where(jnp.asarray(picked) != 0, beta * distance, 0)
    return penalty - jnp.exp(log_ratio) * advantages
