"""Objectives whose importance ratio is one number for a whole answer: GSPO, GSPO-token, GMPO, RLOO's.

The ratio is spread over the scored tokens of its row, so the results are [B, T] like those of every objective, and
``weights.sequence_mean`` gives the mean over answers that the papers take: the sum over a row of loss / length is the
row's loss again, and its gradient the row's gradient. Under ``weights.constant_length`` with ``length=1`` an answer
counts with its number of tokens, which is LUSPO (Liu et al. 2026, https://arxiv.org/abs/2602.05261).

Where the clip of ``gspo`` takes gradients away says
``clipped.clip_indicators(sequence_log_ratio(logps, old_logps, mask), jnp.zeros_like(logps), advantages, mask)``.
"""

import jax
import jax.numpy as jnp

from pt_jax import checks, weights
from pt_jax.objectives import clipped


def _total(x, mask):
    """The sum over a row at each of its scored tokens, and the number of these."""
    mask = jnp.asarray(mask, bool)
    return jnp.where(mask, x.sum(-1, keepdims=True), 0), jnp.maximum(mask.sum(-1, keepdims=True), 1)


def sequence_log_ratio(logps, old_logps, mask):
    """Log of the geometric mean of an answer's token ratios, at every scored token of it.

        log s = 1/|y| sum_t (logps_t - old_logps_t)

    Zheng et al. 2025 (GSPO), https://arxiv.org/abs/2507.18071, equation 7.

    Args:
      logps: [B, T] of the tokens under the policy being trained, in nats.
      old_logps: [B, T] under the policy that sampled them; no gradient flows into it.
      mask: [B, T] bool, the scored tokens; |y| is their number in the row.

    Returns:
      [B, T] float32, in nats; 0 where not scored. Exactly 0 where the policies are the same.

    >>> logps, mask = jnp.array([[-1.0, -2.0, -9.0]]), jnp.array([[True, True, False]])
    >>> print(sequence_log_ratio(logps, jnp.zeros((1, 3)), mask))
    [[-1.5 -1.5 0. ]]
    """
    logps, old_logps = weights.scored(mask, logps=logps, old_logps=old_logps)
    total, length = _total(weights.log_ratio(logps, jax.lax.stop_gradient(old_logps)), mask)
    return total / length


def gspo(logps, old_logps, advantages, mask, *, clip_low=3e-4, clip_high=4e-4):
    """Group sequence policy optimisation: the clipped surrogate on one ratio an answer.

        s = (p(y) / p_old(y))^(1/|y|)
        loss = -min(s A, clip(s, 1 - clip_low, 1 + clip_high) A)

    The gradient spreads evenly: every token of the answer gets s A / |y|. Being a mean of many logarithms, s stays
    near 1, hence the narrow interval.

    Zheng et al. 2025, https://arxiv.org/abs/2507.18071, equations 5 and 7; the interval of its section 5.1.

    Args:
      logps: [B, T] of the tokens under the policy being trained, in nats.
      old_logps: [B, T] under the policy that sampled them; no gradient flows into it.
      advantages: [B, T], the same number over a row (for advantages a token see ``gspo_token``).
      mask: [B, T] bool, the scored tokens.
      clip_low: in [0, 1), how far below 1 the ratio may earn.
      clip_high: >= 0, how far above 1.

    Returns:
      [B, T] float32, the row's loss at each of its scored tokens; 0 where not scored.

    Raises:
      ValueError: the shapes disagree, or a number is out of range.

    >>> logps, A, mask = jnp.log(jnp.array([[4.0, 1.0, 0.5]])), jnp.ones((1, 3)), jnp.array([[True, True, False]])
    >>> print(gspo(logps, jnp.zeros((1, 3)), A, mask, clip_high=9.0))  # the square root of 4 x 1
    [[-2. -2. 0.]]
    >>> print(gspo(logps, jnp.zeros((1, 3)), A, mask, clip_high=0.5))
    [[-1.5 -1.5 0. ]]
    """
    ratio = sequence_log_ratio(logps, old_logps, mask)
    bounds = {"clip_low": clip_low, "clip_high": clip_high}
    return clipped.clipped_surrogate(ratio, jnp.zeros_like(ratio), advantages, mask, **bounds)


def gspo_token(logps, old_logps, advantages, mask, *, clip_low=3e-4, clip_high=4e-4):
    """GSPO for advantages a token: the answer's ratio decides on the clip, each token gets the gradient of its own.

        s_t = sg(s) p_t / sg(p_t)
        loss = -min(s_t A_t, clip(s_t, 1 - clip_low, 1 + clip_high) A_t)

    sg holds its argument constant, so s_t has the value of s and the gradient of s log p_t. With one advantage a row
    it has the value and, in the mean over the row's tokens, the gradient of ``gspo``.

    Zheng et al. 2025, https://arxiv.org/abs/2507.18071, equations 13 and 14. Arguments, numbers and errors as ``gspo``,
    but the advantages may differ within a row.

    Returns:
      [B, T] float32; 0 where not scored.

    >>> logps, A, mask = jnp.log(jnp.array([[4.0, 1.0]])), jnp.array([[1.0, 3.0]]), jnp.ones((1, 2), bool)
    >>> print(gspo_token(logps, jnp.zeros((1, 2)), A, mask, clip_high=9.0))
    [[-2. -6.]]
    """
    hold = jax.lax.stop_gradient
    ratio = hold(sequence_log_ratio(logps, old_logps, mask))
    (logps,) = weights.scored(mask, logps=logps)
    bounds = {"clip_low": clip_low, "clip_high": clip_high}
    return clipped.clipped_surrogate(
        ratio + weights.log_ratio(logps, hold(logps)), jnp.zeros_like(ratio), advantages, mask, **bounds
    )


def gmpo(logps, old_logps, advantages, mask, *, clip_low=0.4, clip_high=0.4):
    """Geometric-mean policy optimisation: each token's ratio is clipped, then their geometric mean is taken.

        u_t = min(log r_t, clip_high)     for A >= 0
        u_t = max(log r_t, -clip_low)     for A < 0
        loss = -exp(1/|y| sum_t u_t) A

    with r_t = p_t / p_old_t. The bounds are of the logarithm: the ratio may earn in (e^-0.4, e^0.4).

    Zhao et al. 2025, https://arxiv.org/abs/2507.20673.

    Args:
      logps: [B, T] of the tokens under the policy being trained, in nats.
      old_logps: [B, T] under the policy that sampled them; no gradient flows into it.
      advantages: [B, T], the same number over a row; no gradient flows into it.
      mask: [B, T] bool, the scored tokens.
      clip_low: >= 0, in nats, how far below 0 the log-ratio may earn.
      clip_high: >= 0, in nats, how far above.

    Returns:
      [B, T] float32, the row's loss at each of its scored tokens; 0 where not scored.

    Raises:
      ValueError: the shapes disagree, or a number is out of range.

    >>> logps, A, mask = jnp.log(jnp.array([[4.0, 1.0]])), jnp.ones((1, 2)), jnp.ones((1, 2), bool)
    >>> print(gmpo(logps, jnp.zeros((1, 2)), A, mask, clip_high=jnp.log(4.0)))
    [[-2. -2.]]
    >>> print(gmpo(logps, jnp.zeros((1, 2)), A, mask).round(4))  # exp(0.4 / 2)
    [[-1.2214 -1.2214]]
    """
    logps, old_logps, advantages = weights.scored(mask, logps=logps, old_logps=old_logps, advantages=advantages)
    checks.between("clip_low", clip_low, 0.0, float("inf"))
    checks.between("clip_high", clip_high, 0.0, float("inf"))
    log_ratio, advantages = (
        weights.log_ratio(logps, jax.lax.stop_gradient(old_logps)),
        jax.lax.stop_gradient(advantages),
    )
    bounded = jnp.where(advantages >= 0, jnp.minimum(log_ratio, clip_high), jnp.maximum(log_ratio, -clip_low))
    total, length = _total(bounded, mask)
    return -jnp.exp(total / length) * advantages


def rloo(logps, old_logps, advantages, mask, *, clip_low=0.2, clip_high=0.2):
    """The clipped surrogate with the answer as the one action: its ratio is the product of the tokens' ratios.

        ratio = exp(sum_t logps_t - sum_t old_logps_t)
        loss = -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)

    On the policy that sampled, its gradient is REINFORCE's, -A times that of the answer's log-probability: with
    ``advantages.leave_one_out`` it is RLOO.

    Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740; the clip, for further updates on the same answers, is TRL's.

    Args:
      logps: [B, T] of the tokens under the policy being trained, in nats.
      old_logps: [B, T] under the policy that sampled them; no gradient flows into it.
      advantages: [B, T], the same number over a row; no gradient flows into it.
      mask: [B, T] bool, the scored tokens.
      clip_low: in [0, 1), how far below 1 the ratio may earn.
      clip_high: >= 0, how far above 1.

    Returns:
      [B, T] float32, the row's loss at each of its scored tokens; 0 where not scored.

    Raises:
      ValueError: the shapes disagree, or a number is out of range.

    >>> logps, A, mask = jnp.log(jnp.array([[3.0, 0.5, 7.0]])), jnp.ones((1, 3)), jnp.array([[True, True, False]])
    >>> print(rloo(logps, jnp.zeros((1, 3)), A, mask, clip_high=9.0))
    [[-1.5 -1.5 0. ]]
    """
    now, old = weights.scored(mask, logps=logps, old_logps=old_logps)
    ratio, _ = _total(weights.log_ratio(now, jax.lax.stop_gradient(old)), mask)
    bounds = {"clip_low": clip_low, "clip_high": clip_high}
    return clipped.clipped_surrogate(ratio, jnp.zeros_like(ratio), advantages, mask, **bounds)
