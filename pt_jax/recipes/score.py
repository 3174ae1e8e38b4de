"""Log-probabilities of given tokens under given parameters: what references and importance ratios need."""

import jax

from pt_jax import logps
from pt_jax.sampling import Sampling, transform


def make_score(apply, how: Sampling | None = None):
    """A jitted ``(params, tokens, seen) -> logps [B, T]`` of the distribution that ``how`` describes.

    Args:
      apply: ``(params, tokens, seen) -> (logits, cache)``.
      how: the sampled distribution; temperature 1 when None.
    """
    how = Sampling() if how is None else how

    @jax.jit
    def score(params, tokens, seen):
        return logps.token_logps(transform(apply(params, tokens, seen)[0], how), tokens)

    return score
