"""From the rewards of a group of answers to the advantage of each.

A group is the G answers sampled for one prompt. A reward of NaN says that the answer could not be judged: it gets
advantage 0, and the others get what they would have got without it.
"""

import jax.numpy as jnp

from pt_jax import checks


def _moments(rewards):
    """Rewards shifted by the group's smallest (exact for equal rewards), their mean, and how many were judged."""
    size = checks.shapes(rewards=(rewards, "P G"))
    if size["G"] < 2:
        raise ValueError(f"rewards has groups of {size['G']}: a group needs at least 2 answers to be compared")
    rewards = jnp.asarray(rewards, jnp.promote_types(jnp.result_type(rewards), jnp.float32))
    judged = ~jnp.isnan(rewards)
    # The mean of G copies of 0.35 in float32 is not 0.35; that of G zeros is 0. Without this shift, groups of equal
    # rewards get advantages of 1e-8 / (0 + epsilon) instead of 0.
    smallest = jnp.min(jnp.where(judged, rewards, jnp.inf), -1, keepdims=True)
    shifted = jnp.where(judged, rewards - jnp.where(jnp.isfinite(smallest), smallest, 0), 0)
    count = jnp.maximum(judged.sum(-1, keepdims=True), 1)
    return shifted, shifted.sum(-1, keepdims=True) / count, judged, count


def group_centred(rewards):
    """How much better each answer did than the mean of its group: A_g = r_g - mean(r).

    Liu et al. 2025 (Dr. GRPO), https://arxiv.org/abs/2503.20783, section 3.2.

    Args:
      rewards: [P, G], one row a prompt, one column a sampled answer; G >= 2; NaN for an answer without verdict.

    Returns:
      [P, G] float32; every row sums to 0.

    Raises:
      ValueError: rewards is not of two axes, or a group is a single answer.

    >>> print(group_centred(jnp.array([[0.0, 1.0], [0.35, 0.35]])))
    [[-0.5  0.5]
     [ 0.   0. ]]
    """
    shifted, mean, judged, _ = _moments(rewards)
    return jnp.where(judged, shifted - mean, 0)


def group_relative(rewards, *, epsilon=1e-4):
    """Group-centred rewards over the group's standard deviation: A_g = (r_g - mean(r)) / (std(r) + epsilon).

    Shao et al. 2024 (GRPO), https://arxiv.org/abs/2402.03300, section 4.1.2. The deviation is the population's (over
    G, not G - 1); a group of equal rewards gets 0.

    Args:
      rewards: [P, G] as in ``group_centred``.
      epsilon: > 0, keeps groups of nearly equal rewards from being blown up.

    Returns:
      [P, G] float32; every row sums to 0.

    Raises:
      ValueError: as ``group_centred``, or epsilon is not above 0.

    >>> print(group_relative(jnp.array([[0.0, 1.0, jnp.nan], [1.0, 1.0, 1.0]])).round(3))
    [[-1.  1.  0.]
     [ 0.  0.  0.]]
    """
    checks.positive("epsilon", epsilon)
    shifted, mean, judged, count = _moments(rewards)
    centred = jnp.where(judged, shifted - mean, 0)
    deviation = jnp.sqrt(jnp.square(centred).sum(-1, keepdims=True) / count)
    return centred / (deviation + epsilon)
