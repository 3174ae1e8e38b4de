"""Losses that raise the probability of given tokens: pre-training and supervised fine-tuning."""

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

    >>> import jax.numpy as jnp
    >>> print(nll(jnp.log(jnp.array([[1.0, 0.5, 0.25]])), jnp.array([[False, False, True]])).round(4))
    [[-0.     -0.      1.3863]]
    """
    (logps,) = weights.scored(mask, logps=logps)
    return -logps
