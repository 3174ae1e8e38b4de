"""Log-probabilities of given tokens under given parameters: what references and importance ratios need."""

import jax

from pt_jax import logps
from pt_jax.sampling import Sampling, scored_logits


def make_score(apply, how: Sampling | None = None):
    """A jitted ``(params, tokens, seen, mask=None) -> logps [B, T]`` of the distribution that ``how`` describes.

    The mask [B, T] says which tokens were sampled; ``min_length`` and penalties need it, nothing else does.

    Args:
      apply: ``(params, tokens, seen) -> (logits, cache)``.
      how: the sampled distribution; temperature 1 when None.
    """
    how = Sampling() if how is None else how

    @jax.jit
    def score(params, tokens, seen, mask=None):
        return logps.token_logps(scored_logits(apply(params, tokens, seen)[0], tokens, seen, mask, how), tokens)

    return score
