"""From the rewards of a group of answers to the advantage of each.

A group is the G answers sampled for one prompt. A reward of NaN says that the answer could not be judged: it gets
advantage 0, and the others get what they would have got without it.

GRPO divides by "the group's standard deviation", and under this one name there are several numbers. They differ by
the factor sqrt(G / (G - 1)), 1.41 for two answers, and in what saves the division when all rewards are equal:

    ============================  ====  ===================  ==========================================
    function                      ddof  denominator          as in
    ============================  ====  ===================  ==========================================
    ``group_relative``            0     std + 1e-4           the formula as this package reads it
    ``group_relative_deepseek``   0     std                  Shao et al. 2024; 0 where the deviation is 0
    ``group_relative_article``    0     sqrt(var + 1e-8)     the article that this package implements
    ``group_relative_trl``        1     std + 1e-4           TRL
    ``group_relative_verl``       1     std + 1e-6           verl
    ============================  ====  ===================  ==========================================

ddof is what is taken from G before the squares are averaged: 0 gives the deviation of these answers, 1 an estimate
of the deviation of all answers to the prompt.
"""

import jax
import jax.numpy as jnp

from pt_jax import checks


def _judged(rewards, least=2):
    """Rewards of groups in float32 or wider, and which of them are numbers, after the checks."""
    size = checks.shapes(rewards=(rewards, "P G"))
    if size["G"] < least:
        raise ValueError(f"rewards has groups of {size['G']}: a group needs at least {least} answers to be compared")
    rewards = jnp.asarray(rewards, jnp.promote_types(jnp.result_type(rewards), jnp.float32))
    return rewards, ~jnp.isnan(rewards)


def _shifted(x, there, axis=-1):
    """x less the smallest of those ``there``, 0 elsewhere.

    The mean of G copies of 0.35 in float32 is not 0.35; that of G zeros is 0. Without this shift, equal rewards get
    advantages of 1e-8 / (0 + epsilon) instead of 0.
    """
    x = jnp.where(there, x, 0)
    smallest = jax.lax.stop_gradient(jnp.min(jnp.where(there, x, jnp.inf), axis, keepdims=True))
    return jnp.where(there, x - jnp.where(jnp.isfinite(smallest), smallest, 0), 0)


def _centred(x, there, axis=-1):
    """x less the mean of those ``there``, 0 elsewhere, and how many there are (at least 1, to divide by)."""
    shifted = _shifted(x, there, axis)
    count = jnp.maximum(there.sum(axis, keepdims=True), 1)
    return jnp.where(there, shifted - shifted.sum(axis, keepdims=True) / count, 0), count


def _variance(centred, count, ddof, axis=-1):
    return jnp.square(centred).sum(axis, keepdims=True) / jnp.where(count > ddof, count - ddof, 1)


def _root(variance):
    """The square root, with slope 0 instead of infinity at 0."""
    return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)


def _check_spread(ddof, epsilon):
    checks.between("ddof", ddof, 0.0, 2.0)
    checks.positive("epsilon", epsilon)


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
    return _centred(*_judged(rewards))[0]


def group_deviation(rewards, *, ddof=1):
    """The standard deviation of each group: s = sqrt(sum_g (r_g - mean(r))^2 / (G - ddof)).

    Exactly 0 for a group of equal rewards, which teaches nothing: Yu et al. 2025 (DAPO),
    https://arxiv.org/abs/2503.14476, section 3.2, samples other prompts in its place.

    Args:
      rewards: [P, G] as in ``group_centred``; an answer without verdict does not count.
      ddof: in [0, 2), what is taken from G; 1 estimates the deviation of all answers from that of these.

    Returns:
      [P] float32; NaN where no more than ``ddof`` answers were judged.

    Raises:
      ValueError: as ``group_centred``, or ddof is out of range.

    >>> print(group_deviation(jnp.array([[1.0, 2.0, 3.0], [0.35, 0.35, jnp.nan]])))
    [1. 0.]
    """
    checks.between("ddof", ddof, 0.0, 2.0)
    rewards, judged = _judged(rewards)
    centred, count = _centred(rewards, judged)
    enough = judged.sum(-1) > ddof
    return jnp.where(enough, _root(_variance(centred, count, ddof))[..., 0], jnp.nan)


def group_relative(rewards, *, ddof=0, epsilon=1e-4):
    """Group-centred rewards over the group's standard deviation: A_g = (r_g - mean(r)) / (std(r) + epsilon).

    Shao et al. 2024 (GRPO), https://arxiv.org/abs/2402.03300, section 4.1.2. The deviation is the population's (over
    G, not G - 1) unless ``ddof`` says otherwise; a group of equal rewards gets 0. Other denominators: see the module.

    Args:
      rewards: [P, G] as in ``group_centred``.
      ddof: in [0, 2), what is taken from G in the deviation.
      epsilon: > 0, keeps groups of nearly equal rewards from being blown up.

    Returns:
      [P, G] float32; every row sums to 0.

    Raises:
      ValueError: as ``group_centred``, or a number is out of range.

    >>> print(group_relative(jnp.array([[0.0, 1.0, jnp.nan], [1.0, 1.0, 1.0]])).round(3))
    [[-1.  1.  0.]
     [ 0.  0.  0.]]
    """
    _check_spread(ddof, epsilon)
    centred, count = _centred(*_judged(rewards))
    return centred / (_root(_variance(centred, count, ddof)) + epsilon)


def group_relative_inside_root(rewards, *, ddof=0, epsilon=1e-8):
    """Group-relative with epsilon under the root: A_g = (r_g - mean(r)) / sqrt(var(r) + epsilon).

    ``group_relative`` otherwise, of Shao et al. 2024 (GRPO), https://arxiv.org/abs/2402.03300, section 4.1.2. Under
    the root an epsilon is in squared rewards: 1e-8 bounds the division as 1e-4 does outside.

    Args:
      rewards: [P, G] as in ``group_centred``.
      ddof: in [0, 2), what is taken from G in the variance.
      epsilon: > 0.

    Returns:
      [P, G] float32; every row sums to 0.

    Raises:
      ValueError: as ``group_relative``.

    >>> print(group_relative_inside_root(jnp.array([[0.0, 2.0]]), epsilon=3.0))  # 1 / sqrt(1 + 3)
    [[-0.5  0.5]]
    """
    _check_spread(ddof, epsilon)
    centred, count = _centred(*_judged(rewards))
    return centred * jax.lax.rsqrt(_variance(centred, count, ddof) + epsilon)


def group_relative_deepseek(rewards):
    """As printed, with nothing added to the denominator: A_g = (r_g - mean(r)) / std(r), and 0 where std(r) = 0.

    Shao et al. 2024 (GRPO), https://arxiv.org/abs/2402.03300, section 4.1.2, which does not say what it divides the
    squares by; G here.

    Args:
      rewards: [P, G] as in ``group_centred``.

    Returns:
      [P, G] float32; every row has mean 0 and deviation 1, or is 0.

    Raises:
      ValueError: as ``group_centred``.

    >>> print(group_relative_deepseek(jnp.array([[0.0, 1e-6], [0.35, 0.35]])))
    [[-1.  1.]
     [ 0.  0.]]
    """
    centred, count = _centred(*_judged(rewards))
    deviation = _root(_variance(centred, count, 0))
    return centred / jnp.where(deviation > 0, deviation, 1)


def group_relative_article(rewards):
    """The article's: A_g = (r_g - mean(r)) / sqrt(sum_g (r_g - mean(r))^2 / G + 1e-8).

    ``group_relative_inside_root`` with its defaults; the article leaves epsilon open. After Shao et al. 2024 (GRPO),
    https://arxiv.org/abs/2402.03300.

    Args:
      rewards: [P, G] as in ``group_centred``.

    Returns:
      [P, G] float32; every row sums to 0.

    Raises:
      ValueError: as ``group_centred``.

    >>> print(group_relative_article(jnp.array([[0.0, 1.0]])).round(3))
    [[-1.  1.]]
    """
    return group_relative_inside_root(rewards, ddof=0, epsilon=1e-8)


def group_relative_trl(rewards):
    """TRL's: A_g = (r_g - mean(r)) / (s + 1e-4) with s^2 = sum_g (r_g - mean(r))^2 / (G - 1).

    ``GRPOTrainer`` with ``scale_rewards="group"``, https://github.com/huggingface/trl. Two answers get 0.707 each
    where ``group_relative`` gives 1.

    Args:
      rewards: [P, G] as in ``group_centred``.

    Returns:
      [P, G] float32; every row sums to 0.

    Raises:
      ValueError: as ``group_centred``.

    >>> print(group_relative_trl(jnp.array([[1.0, 2.0, 3.0]])).round(3))
    [[-1. 0. 1.]]
    """
    return group_relative(rewards, ddof=1, epsilon=1e-4)


def group_relative_verl(rewards):
    """verl's: A_g = (r_g - mean(r)) / (s + 1e-6) with s^2 = sum_g (r_g - mean(r))^2 / (G - 1).

    ``compute_grpo_outcome_advantage``, https://github.com/volcengine/verl.

    Args:
      rewards: [P, G] as in ``group_centred``.

    Returns:
      [P, G] float32; every row sums to 0.

    Raises:
      ValueError: as ``group_centred``.

    >>> print(group_relative_verl(jnp.array([[1.0, 2.0, 3.0]])).round(3))
    [[-1. 0. 1.]]
    """
    return group_relative(rewards, ddof=1, epsilon=1e-6)


def leave_one_out(rewards):
    """How much better each answer did than the others of its group: A_g = r_g - sum_{h != g} r_h / (G - 1).

    Kool et al. 2019, https://openreview.net/forum?id=r1lgTGL5DE; Ahmadian et al. 2024 (RLOO),
    https://arxiv.org/abs/2402.14740. A baseline in which the answer itself has no part leaves the gradient unbiased.
    It is the group-centred reward times G / (G - 1), and computed so: exactly 0 where all rewards are equal.

    Args:
      rewards: [P, G] as in ``group_centred``; an answer without verdict is in nobody's baseline.

    Returns:
      [P, G] float32; every row sums to 0; 0 for the only answer that was judged.

    Raises:
      ValueError: as ``group_centred``.

    >>> print(leave_one_out(jnp.array([[0.0, 1.0, 2.0], [0.0, 1.0, jnp.nan]])))
    [[-1.5 0. 1.5]
     [-1.  1.  0. ]]
    """
    centred, count = _centred(*_judged(rewards))
    return centred * (count / jnp.maximum(count - 1, 1)).astype(centred.dtype)
