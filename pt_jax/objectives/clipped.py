"""The clipped surrogate of PPO and GRPO: Schulman et al. 2017, https://arxiv.org/abs/1707.06347, equation 7.

The other objectives of a clipped ratio (``sequence``) are this one with another ratio.
"""

import jax
import jax.numpy as jnp

from pt_jax import checks, weights


def _log_ratio(logps, old_logps, advantages, mask, clip_low, clip_high):
    """log(p / p_old) and the advantages, both 0 where not scored, after the checks."""
    logps, old_logps, advantages = weights.scored(mask, logps=logps, old_logps=old_logps, advantages=advantages)
    checks.between("clip_low", clip_low, 0.0, 1.0)
    checks.between("clip_high", clip_high, 0.0, float("inf"))
    return weights.log_ratio(logps, jax.lax.stop_gradient(old_logps)), jax.lax.stop_gradient(advantages)


def clipped_surrogate(logps, old_logps, advantages, mask, *, clip_low=0.2, clip_high=0.2):
    """PPO's clipped objective, negated.

        ratio = exp(logps - old_logps)
        loss = -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)

    which is -min(ratio, 1 + clip_high) A for A >= 0 and -max(ratio, 1 - clip_low) A for A < 0; it is coded so, with
    the bounds taken of the logarithm, because a ratio that overflows would otherwise turn a gradient of 0 into NaN.

    Schulman et al. 2017, https://arxiv.org/abs/1707.06347, equation 7; clip_high > clip_low is the "clip-higher" of
    Yu et al. 2025 (DAPO), https://arxiv.org/abs/2503.14476, equation 10. With ``weights.sequence_mean`` it is GRPO's,
    with ``weights.token_mean`` DAPO's, with ``weights.constant_length`` that of Dr. GRPO.

    Args:
      logps: [B, T] of the tokens under the policy being trained, in nats.
      old_logps: [B, T] under the policy that sampled them; no gradient flows into it.
      advantages: [B, T], the same number over a row in GRPO; no gradient flows into it.
      mask: [B, T] bool, the scored tokens.
      clip_low: in [0, 1), how far below 1 the ratio may earn.
      clip_high: >= 0, how far above 1.

    Returns:
      [B, T] float32; 0 where not scored. The gradient is 0 where the ratio has left the interval in the direction
      that the advantage rewards, and not clipped where it has left in the other.

    Raises:
      ValueError: the shapes disagree, or a number is out of range.

    >>> ratio, A = jnp.array([[1.5, 0.5, 1.5]]), jnp.array([[1.0, 1.0, -1.0]])
    >>> print(clipped_surrogate(jnp.log(ratio), jnp.zeros((1, 3)), A, jnp.ones((1, 3), bool)))
    [[-1.2 -0.5 1.5]]
    """
    log_ratio, advantages = _log_ratio(logps, old_logps, advantages, mask, clip_low, clip_high)
    from_above = jnp.minimum(log_ratio, jnp.log1p(clip_high))
    from_below = jnp.maximum(log_ratio, jnp.log1p(-clip_low))
    return -jnp.exp(jnp.where(advantages >= 0, from_above, from_below)) * advantages


def dual_clip(logps, old_logps, advantages, mask, *, clip_low=0.2, clip_high=0.2, clip_dual=2.0):
    """The clipped surrogate with a bound for bad tokens as well: a negative advantage costs at most c = 1 + clip_dual.

        loss = -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)              for A >= 0
        loss = -max(min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), c A)    for A < 0

    PPO's loss has no bound where A < 0 and the ratio is large: one token that the old policy thought impossible can
    outweigh the batch. The bound takes the gradient of such a token away.

    Ye et al. 2020, https://arxiv.org/abs/1912.09729, with c = 3; the "two-sided clipping" of INTELLECT-2,
    https://arxiv.org/abs/2505.07291, is the same (their delta is c). Arguments and errors as ``clipped_surrogate``, and

    Args:
      clip_dual: > 0, how far above 1 the ratio of a token with negative advantage may cost; from clip_high upwards it
        leaves the other bounds alone.

    Returns:
      [B, T] float32; 0 where not scored. Never above (1 + clip_dual) |A|.

    >>> ratio, A = jnp.array([[9.0, 9.0, 2.0]]), jnp.array([[1.0, -1.0, -1.0]])
    >>> print(dual_clip(jnp.log(ratio), jnp.zeros((1, 3)), A, jnp.ones((1, 3), bool)))
    [[-1.2 3. 2. ]]
    """
    log_ratio, advantages = _log_ratio(logps, old_logps, advantages, mask, clip_low, clip_high)
    checks.positive("clip_dual", clip_dual)
    from_above = jnp.minimum(log_ratio, jnp.log1p(clip_high))
    from_below = jnp.minimum(jnp.maximum(log_ratio, jnp.log1p(-clip_low)), jnp.log1p(clip_dual))
    return -jnp.exp(jnp.where(advantages >= 0, from_above, from_below)) * advantages


def clip_indicators(logps, old_logps, advantages, mask, *, clip_low=0.2, clip_high=0.2):
    """Where the clip takes the gradient away: two [B, T] float32 of 0 and 1, below the interval and above it.

        low = [ratio < 1 - clip_low and A < 0],   high = [ratio > 1 + clip_high and A > 0]

    Below counts with a negative advantage only and above with a positive one, because only there does the clipped
    branch win. Arguments as ``clipped_surrogate``.

    >>> ratio, A = jnp.array([[1.5, 0.5, 0.5]]), jnp.array([[1.0, 1.0, -1.0]])
    >>> low, high = clip_indicators(jnp.log(ratio), jnp.zeros((1, 3)), A, jnp.ones((1, 3), bool))
    >>> print(low, high)
    [[0. 0. 1.]] [[1. 0. 0.]]
    """
    log_ratio, advantages = _log_ratio(logps, old_logps, advantages, mask, clip_low, clip_high)
    low = (log_ratio < jnp.log1p(-clip_low)) & (advantages < 0)
    high = (log_ratio > jnp.log1p(clip_high)) & (advantages > 0)
    return low.astype(jnp.float32), high.astype(jnp.float32)
