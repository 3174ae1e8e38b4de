"""What to do with answers that ran out of tokens: Yu et al. 2025 (DAPO), https://arxiv.org/abs/2503.14476, section 3.4.

Their reward says "wrong" of an answer that may have been right. Either it does not teach at all
(``without_unfinished``), or the reward tells the policy beforehand that the end is near (``soft_overlong``).
"""

import jax.numpy as jnp

from pt_jax import checks, weights


def soft_overlong(lengths, *, max_length=20480, cache=4096):
    """Soft overlong punishment: a reward that falls from 0 to -1 over the last tokens that an answer may have.

        reward = 0                                        for length <= max_length - cache
        reward = (max_length - cache - length) / cache    in between
        reward = -1                                       for length > max_length

    Yu et al. 2025 (DAPO), https://arxiv.org/abs/2503.14476, equation 13. It is added to the reward of the answer.

    Args:
      lengths: [P, G], sampled tokens of the answers.
      max_length: > 0, tokens from which on the punishment is full.
      cache: > 0, tokens over which it grows.

    Returns:
      [P, G] float32, in [-1, 0].

    Raises:
      ValueError: lengths is not of two axes, or a number is not above 0.

    >>> print(soft_overlong(jnp.array([[6, 8, 9, 30]]), max_length=10, cache=4))
    [[ 0. -0.5 -0.75 -1. ]]
    """
    checks.shapes(lengths=(lengths, "P G"))
    checks.positive("max_length", max_length)
    checks.positive("cache", cache)
    lengths = jnp.asarray(lengths)
    lengths = lengths.astype(jnp.promote_types(lengths.dtype, jnp.float32))
    return jnp.clip((max_length - cache - lengths) / cache, -1, 0)


def without_unfinished(mask, finished):
    """Overlong filtering: the mask without the answers that were cut off.

        mask'_it = mask_it finished_i

    Yu et al. 2025 (DAPO), https://arxiv.org/abs/2503.14476, section 3.4. Make the weights from the result, and the
    answers that were cut off neither teach nor count; TRL's mask_truncated_completions.

    Args:
      mask: [B, T] bool, the scored tokens.
      finished: [B] bool, whether the answer reached its end.

    Returns:
      [B, T] float32 of 0 and 1, to be used as a mask.

    Raises:
      ValueError: the shapes disagree.

    >>> print(without_unfinished(jnp.ones((2, 3), bool), jnp.array([True, False])))
    [[1. 1. 1.]
     [0. 0. 0.]]
    """
    checks.shapes(mask=(mask, "B T"), finished=(finished, "B"))
    finished = jnp.asarray(finished, bool)[:, None]
    return weights.zero_unscored(finished, jnp.asarray(mask, jnp.float32))[0]
