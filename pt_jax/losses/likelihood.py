"""Losses that raise the probability of given tokens: pre-training and supervised fine-tuning."""

import jax
import jax.numpy as jnp

from pt_jax import weights


def nll(logps, mask):
    """Negative log-likelihood, a token: -log p(token | tokens before).

    Pre-training scores every token; supervised fine-tuning scores the response and not the prompt: the mask is the
    whole difference. Radford et al. 2018,
    https://cdn.openai.com/research-covers/language-unsupervised/language_understanding_paper.pdf, equation 1.

    Args:
      logps: [B, T] from ``logps.token_logps``, in nats.
      mask: [B, T] bool, the scored tokens.

    Returns:
      [B, T] float32, in nats; 0 where not scored.

    Raises:
      ValueError: the shapes disagree.

    >>> print(nll(jnp.log(jnp.array([[1.0, 0.5, 0.25]])), jnp.array([[False, False, True]])).round(4))
    [[-0.     -0.      1.3863]]
    """
    (logps,) = weights.scored(mask, logps=logps)
    return -logps


def dft(logps, mask):
    """Dynamic fine-tuning: negative log-likelihood, each token weighted with the probability that it has now.

        loss = -sg(p) log p,   gradient -p d(log p) = -dp

    As policy gradients go, plain likelihood rewards a token with 1 / p, so that unlikely ones rule the gradient; the
    factor takes that out again. Wu et al. 2025, https://arxiv.org/abs/2508.05629, equation 9.

    Args:
      logps: [B, T] from ``logps.token_logps``, in nats.
      mask: [B, T] bool, the scored tokens.

    Returns:
      [B, T] float32, in nats; 0 where not scored.

    Raises:
      ValueError: the shapes disagree.

    >>> print(dft(jnp.log(jnp.array([[1.0, 0.5, 0.25]])), jnp.array([[False, False, True]])).round(4))  # log(4) / 4
    [[0. 0. 0.3466]]
    """
    (logps,) = weights.scored(mask, logps=logps)
    possible = ~jnp.isneginf(logps)  # 0 log 0 is 0: an impossible token pulls at nothing
    return -jax.lax.stop_gradient(jnp.exp(logps)) * jnp.where(possible, logps, 0)
