"""Losses of a critic, which learns what is still to be earned from each token on."""

import jax
import jax.numpy as jnp

from pt_jax import checks, weights


def value_loss(values, returns, mask):
    """Half the squared error of a value: loss = (V - R)^2 / 2.

    Schulman et al. 2017, https://arxiv.org/abs/1707.06347, equation 9 (L^VF).

    Args:
      values: [B, T] of the critic being trained.
      returns: [B, T], what the values should have been, for example of ``advantages.gae``; no gradient flows into it.
      mask: [B, T] bool, the scored tokens.

    Returns:
      [B, T] float32; 0 where not scored.

    Raises:
      ValueError: the shapes disagree.

    >>> print(value_loss(jnp.array([[1.0, 5.0]]), jnp.array([[3.0, 5.0]]), jnp.ones((1, 2), bool)))
    [[2. 0.]]
    """
    values, returns = weights.scored(mask, values=values, returns=returns)
    return jnp.square(values - jax.lax.stop_gradient(returns)) / 2


def _errors(values, old_values, returns, mask, clip):
    """Half the squared error of the value, and of the value as far as it may have moved."""
    values, old_values, returns = weights.scored(mask, values=values, old_values=old_values, returns=returns)
    checks.positive("clip", clip)
    old_values = jax.lax.stop_gradient(old_values)
    clipped = jnp.clip(values, old_values - clip, old_values + clip)
    return value_loss(values, returns, mask), value_loss(clipped, returns, mask)


def clipped_value_loss(values, old_values, returns, mask, *, clip=0.2):
    """PPO's value loss, which takes the worse of the value and of the value kept near what it was when sampling.

        V_clip = clip(V, V_old - clip, V_old + clip)
        loss = max((V - R)^2, (V_clip - R)^2) / 2

    So there is no gradient where the value has moved by more than ``clip`` towards the return.

    Not in the PPO paper but in its code; written down by Engstrom et al. 2020 (Implementation Matters),
    https://arxiv.org/abs/2005.12729, section 3.

    Args:
      values: [B, T] of the critic being trained.
      old_values: [B, T] of the critic when the tokens were sampled; no gradient flows into it.
      returns: [B, T], what the values should have been; no gradient flows into it.
      mask: [B, T] bool, the scored tokens.
      clip: > 0, in units of reward.

    Returns:
      [B, T] float32; 0 where not scored.

    Raises:
      ValueError: the shapes disagree, or clip is not above 0.

    >>> ones, mask = jnp.ones((1, 2)), jnp.ones((1, 2), bool)
    >>> print(clipped_value_loss(jnp.array([[1.0, -1.0]]), 0 * ones, ones, mask, clip=0.5))  # moved well, moved badly
    [[0.125 2. ]]
    """
    return jnp.maximum(*_errors(values, old_values, returns, mask, clip))


def value_clip_indicator(values, old_values, returns, mask, *, clip=0.2):
    """Where the clip of ``clipped_value_loss`` takes the gradient away: [(V_clip - R)^2 > (V - R)^2], 0 or 1.

    Engstrom et al. 2020, https://arxiv.org/abs/2005.12729; arguments as ``clipped_value_loss``. Its mean is what is
    logged as ``val/clipfrac_avg``.

    >>> ones, mask = jnp.ones((1, 2)), jnp.ones((1, 2), bool)
    >>> print(value_clip_indicator(jnp.array([[1.0, -1.0]]), 0 * ones, ones, mask, clip=0.5))
    [[1. 0.]]
    """
    free, clipped = _errors(values, old_values, returns, mask, clip)
    return (clipped > free).astype(free.dtype)
