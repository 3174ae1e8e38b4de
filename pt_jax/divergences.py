"""Estimates of KL(policy || reference) from the log-probabilities of tokens that the policy sampled.

With r = p_ref(token) / p(token) and tokens drawn from the policy p (Schulman 2020,
http://joschu.net/blog/kl-approx.html):

    ====  ===================  =============================  ====================================================
    name  value a token        mean over samples              its gradient, as a loss on sampled tokens
    ====  ===================  =============================  ====================================================
    k1    -log r               exactly the KL                 0 on average: it does not pull towards the reference
    k2    (log r)^2 / 2        biased, little when near       exactly the KL's gradient
    k3    r - 1 - log r        exactly the KL, never < 0      exactly that of KL(reference || policy)
    ====  ===================  =============================  ====================================================

So k1 belongs into a reward, k2 or k3 into a loss. The claims of the table are tested against enumeration.
"""

import jax.numpy as jnp

from pt_jax import weights


def _gap(logps, ref_logps, mask):
    logps, ref_logps = weights.scored(mask, logps=logps, ref_logps=ref_logps)
    return ref_logps - logps


def k1(logps, ref_logps, mask):
    """k1 = log p - log p_ref, a token: unbiased, of either sign. See the module for when to use which.

    Args:
      logps: [B, T] of the policy that sampled the tokens, in nats.
      ref_logps: [B, T] of the reference, in nats.
      mask: [B, T] bool, the scored tokens.

    Returns:
      [B, T] float32, in nats; 0 where not scored.

    >>> logps, ref_logps, mask = jnp.log(jnp.array([[[0.5, 0.8]], [[0.25, 0.8]], [[1, 1]]]))
    >>> print(k1(logps, ref_logps, mask == 0).round(4))  # log 2, 0
    [[0.6931 0.    ]]
    """
    return 0 - _gap(logps, ref_logps, mask)


def k2(logps, ref_logps, mask):
    """k2 = (log p - log p_ref)^2 / 2, a token; arguments as ``k1``.

    >>> logps, ref_logps, mask = jnp.log(jnp.array([[[0.5, 0.8]], [[0.25, 0.8]], [[1, 1]]]))
    >>> print(k2(logps, ref_logps, mask == 0).round(4))
    [[0.2402 0.    ]]
    """
    return jnp.square(_gap(logps, ref_logps, mask)) / 2


def k3(logps, ref_logps, mask):
    """k3 = p_ref / p - 1 - log(p_ref / p), a token; never negative; arguments as ``k1``.

    The penalty of Shao et al. 2024 (GRPO), https://arxiv.org/abs/2402.03300, equation 4.

    >>> logps, ref_logps, mask = jnp.log(jnp.array([[[0.5, 0.8]], [[0.25, 0.8]], [[1, 1]]]))
    >>> print(k3(logps, ref_logps, mask == 0).round(4))  # 1/2 - 1 + log 2
    [[0.1931 0.    ]]
    """
    gap = _gap(logps, ref_logps, mask)
    return jnp.expm1(gap) - gap
