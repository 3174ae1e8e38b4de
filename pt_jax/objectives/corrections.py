"""Corrections for tokens that another policy sampled than the one whose log-probabilities are the old ones.

A separate sampler (another engine, another number format, older weights) gives a token another probability than the
trainer does. The correction is a factor of the loss, a token or an answer; it is held constant:

    loss = treatment(ratio) objective(logps, old_logps, A)

    =====================  ==================================================================================
    TIS, a token           ``truncated(token_ratio(old_logps, sampling_logps, mask), mask)``
    TIS, an answer         ``truncated(sequence_ratio(old_logps, sampling_logps, mask), mask)``
    IcePop                 ``within(token_ratio(old_logps, sampling_logps, mask), mask)``
    sequence mask          ``within(sequence_ratio(...), mask)``, or of ``geometric_ratio`` for any length
    off-policy mask        ``off_policy_sequence_mask(logps, sampling_logps, advantages, mask)``
    =====================  ==================================================================================

The ratio of a token is biased (what came before it was sampled by the sampler too) and of low variance; that of an
answer is unbiased, and its variance grows with the length. Where sampler and trainer are one program, as in this
package, all factors are 1.
"""

import jax
import jax.numpy as jnp

from pt_jax import checks, weights
from pt_jax.objectives import sequence


def _log_ratio(sampling_logps, mask, **of_the_trainer):
    """The trainer's log-probabilities less the sampler's, held constant; 0 where nothing is scored or said."""
    logps, sampling_logps = weights.scored(mask, **of_the_trainer, sampling_logps=sampling_logps)
    return jax.lax.stop_gradient(jnp.where(jnp.isnan(sampling_logps), 0, weights.log_ratio(logps, sampling_logps)))


def token_ratio(old_logps, sampling_logps, mask):
    """What the trainer's probability of a token is to the sampler's.

        ratio = p_trainer / p_sampler = exp(old_logps - sampling_logps)

    Yao et al. 2025, https://fengyao.notion.site/off-policy-rl.

    Args:
      old_logps: [B, T] of the tokens under the trainer's policy at the time of sampling, in nats.
      sampling_logps: [B, T] as the sampler gave them; NaN where it gave none: the ratio is 1 there.
      mask: [B, T] bool, the scored tokens.

    Returns:
      [B, T] float32, >= 0; 0 where not scored. No gradient flows through it.

    Raises:
      ValueError: the shapes disagree.

    >>> sampling_logps = jnp.log(jnp.array([[0.5, 0.25, jnp.nan]]))
    >>> print(token_ratio(jnp.log(jnp.full((1, 3), 0.5)), sampling_logps, jnp.ones((1, 3), bool)))
    [[1. 2. 1.]]
    """
    return jnp.where(mask, jnp.exp(_log_ratio(sampling_logps, mask, old_logps=old_logps)), 0)


def sequence_ratio(old_logps, sampling_logps, mask):
    """The same of a whole answer, at each of its scored tokens: the product of the tokens' ratios.

        ratio = exp(sum_t (old_logps_t - sampling_logps_t))

    Yao et al. 2025, https://fengyao.notion.site/off-policy-rl. Arguments as ``token_ratio``.

    >>> sampling_logps = jnp.log(jnp.array([[0.5, 0.25, jnp.nan]]))
    >>> print(sequence_ratio(jnp.log(jnp.full((1, 3), 0.5)), sampling_logps, jnp.ones((1, 3), bool)))
    [[2. 2. 2.]]
    """
    total = _log_ratio(sampling_logps, mask, old_logps=old_logps).sum(-1, keepdims=True)
    return jnp.where(mask, jnp.exp(total), 0)


def geometric_ratio(old_logps, sampling_logps, mask):
    """The geometric mean of an answer's token ratios, at each of its scored tokens: comparable between lengths.

        ratio = exp(1/|y| sum_t (old_logps_t - sampling_logps_t))

    It is no importance weight, but tells an answer that strayed from one that is merely long; see
    https://leonericsson.github.io/blog/2026-02-01-opsm-geometric-masking. Arguments as ``token_ratio``; tokens without
    a sampler's log-probability count as of ratio 1.

    >>> sampling_logps = jnp.log(jnp.array([[0.5, 0.125]]))
    >>> print(geometric_ratio(jnp.log(jnp.full((1, 2), 0.5)), sampling_logps, jnp.ones((1, 2), bool)))
    [[2. 2.]]
    """
    gap = _log_ratio(sampling_logps, mask, old_logps=old_logps)
    return jnp.where(mask, jnp.exp(sequence.sequence_log_ratio(gap, jnp.zeros_like(gap), mask)), 0)


def truncated(ratios, mask, *, cap=2.0):
    """Truncated importance sampling (TIS): ratios are cut off above.

        factor = min(ratio, cap)

    Ionides 2008, https://doi.org/10.1198/106186008X320456; between a sampler and a trainer of language models, with
    cap 2, Yao et al. 2025, https://fengyao.notion.site/off-policy-rl.

    Args:
      ratios: [B, T] of ``token_ratio`` or ``sequence_ratio``.
      mask: [B, T] bool, the scored tokens.
      cap: > 0.

    Returns:
      [B, T] float32, the factor of the loss; 0 where not scored. No gradient flows through it.

    Raises:
      ValueError: the shapes disagree, or cap is not above 0.

    >>> print(truncated(jnp.array([[0.5, 1.0, 9.0]]), jnp.ones((1, 3), bool)))
    [[0.5 1. 2. ]]
    """
    (ratios,) = weights.scored(mask, ratios=ratios)
    checks.positive("cap", cap)
    return jnp.minimum(jax.lax.stop_gradient(ratios), cap)


def within(ratios, mask, *, low=0.5, high=5.0):
    """Masked importance sampling (IcePop): ratios outside of an interval take their tokens out of the loss.

        factor = ratio where low <= ratio <= high, else 0

    Ling team 2025 (Ring-1T), https://arxiv.org/abs/2510.18855. Of ``sequence_ratio`` or ``geometric_ratio`` it takes
    out whole answers.

    Args:
      ratios: [B, T] of ``token_ratio``, ``sequence_ratio`` or ``geometric_ratio``.
      mask: [B, T] bool, the scored tokens.
      low, high: the interval, > 0, both ends belong to it.

    Returns:
      [B, T] float32, the factor of the loss; 0 where not scored. No gradient flows through it.

    Raises:
      ValueError: the shapes disagree, or a bound is not above 0.

    >>> print(within(jnp.array([[0.1, 0.5, 1.5, 9.0]]), jnp.ones((1, 4), bool)))
    [[0. 0.5 1.5 0. ]]
    """
    (ratios,) = weights.scored(mask, ratios=ratios)
    checks.positive("low", low)
    checks.positive("high", high)
    ratios = jax.lax.stop_gradient(ratios)
    return jnp.where((low <= ratios) & (ratios <= high), ratios, 0)


def off_policy_sequence_mask(logps, sampling_logps, advantages, mask, *, threshold=0.5):
    """Off-policy sequence masking: bad answers that the policy has moved away from teach nothing any more.

        keep = 0 where A < 0 and 1/|y| sum_t (sampling_logps_t - logps_t) > threshold, else 1

    The mean estimates the KL between the policy that sampled and the one that is trained, and so sees the drift since
    sampling and the difference between the engines alike.

    DeepSeek-AI 2025 (DeepSeek-V3.2), https://arxiv.org/abs/2512.02556, equation 9.

    Args:
      logps: [B, T] of the tokens under the policy being trained, in nats.
      sampling_logps: [B, T] under the policy that sampled them, by the sampler if it says, else by the trainer; NaN
        for a token without: it adds nothing to the mean.
      advantages: [B, T]; only the sign counts.
      mask: [B, T] bool, the scored tokens.
      threshold: >= 0, in nats a token.

    Returns:
      [B, T] float32 of 0 and 1, the factor of the loss; 0 where not scored. No gradient flows through it.

    Raises:
      ValueError: the shapes disagree, or threshold is out of range.

    >>> logps, mask = jnp.array([[-3.0, -1.0]] * 2), jnp.ones((2, 2), bool)
    >>> print(off_policy_sequence_mask(logps, jnp.full((2, 2), -1.0), jnp.array([[1.0] * 2, [-1.0] * 2]), mask))
    [[1. 1.]
     [0. 0.]]
    """
    checks.between("threshold", threshold, 0.0, float("inf"))
    (advantages,) = weights.scored(mask, advantages=advantages)
    away = _log_ratio(sampling_logps, mask, logps=logps)
    drift = -sequence.sequence_log_ratio(away, jnp.zeros_like(away), mask)
    keep = (advantages >= 0) | (drift <= threshold)
    return jnp.where(mask, keep, False).astype(advantages.dtype)


def importance_weighted(divergence, logps, old_logps, mask):
    """A divergence on tokens that an older policy sampled, as if they were the present one's.

        loss = exp(logps - old_logps) divergence

    With ``divergences.k3(logps, ref_logps, mask)`` it is the "unbiased KL estimate" of DeepSeek-V3.2: value and
    gradient are those of KL(policy || reference), because the gradient flows through the ratio too. Without the ratio,
    the gradient of k3 is that of KL(reference || policy), even where the tokens are the policy's own.

    DeepSeek-AI 2025 (DeepSeek-V3.2), https://arxiv.org/abs/2512.02556; TRL's use_bias_correction_kl. Of whole answers:
    hand in ``sequence.sequence_log_ratio`` as logps and zeros as old_logps.

    Args:
      divergence: [B, T], a token, in nats.
      logps: [B, T] of the tokens under the policy being trained, in nats.
      old_logps: [B, T] under the policy that sampled them; no gradient flows into it.
      mask: [B, T] bool, the scored tokens.

    Returns:
      [B, T] float32, in nats; 0 where not scored.

    Raises:
      ValueError: the shapes disagree.

    >>> logps = jnp.log(jnp.array([[0.5, 0.25]]))
    >>> print(importance_weighted(jnp.ones((1, 2)), logps, jnp.log(jnp.full((1, 2), 0.5)), jnp.ones((1, 2), bool)))
    [[1. 0.5]]
    """
    divergence, logps, old_logps = weights.scored(mask, divergence=divergence, logps=logps, old_logps=old_logps)
    return jnp.exp(weights.log_ratio(logps, jax.lax.stop_gradient(old_logps))) * divergence
