"""Advantages measured with the spread of the whole batch.

These look at all groups, or all tokens, at once: call them before the batch is dealt to microbatches, and over all
devices. A reward of NaN takes its own answer out of every mean and every deviation, and gets 0.
"""

import jax
import jax.numpy as jnp

from pt_jax import weights
from pt_jax.advantages.groups import _centred, _check_spread, _judged, _root, _variance
from pt_jax.advantages.returns import reward_to_go


def _over_the_batch(x, there, ddof, epsilon):
    """(x - mean) / (std + epsilon), both over all those ``there``."""
    centred, count = _centred(x, there, axis=(0, 1))
    return centred / (_root(_variance(centred, count, ddof, axis=(0, 1))) + epsilon)


def batch_normalised(rewards, *, ddof=1, epsilon=1e-4):
    """The mean from the group, the spread from the batch: A_pg = (r_pg - mean_g r_pg) / (std_pg r_pg + epsilon).

    Liu et al. 2025 (Lite PPO), https://arxiv.org/abs/2508.08221; ``scale_rewards="batch"`` of TRL. A group whose
    answers hardly differ is not blown up to the spread of the others.

    Args:
      rewards: [P, G], G >= 2; NaN for an answer without verdict.
      ddof: in [0, 2), what is taken from the number of answers in the deviation.
      epsilon: > 0.

    Returns:
      [P, G] float32; every row sums to 0.

    Raises:
      ValueError: rewards is not of two axes, a group is a single answer, or a number is out of range.

    >>> rewards = jnp.array([[1.0, 3.0], [-3.0, -1.0]])  # deviation sqrt(5) about the mean of 0
    >>> print(batch_normalised(rewards, ddof=0).round(3))
    [[-0.447  0.447]
     [-0.447  0.447]]
    """
    _check_spread(ddof, epsilon)
    rewards, judged = _judged(rewards)
    centred, count = _centred(rewards, judged, axis=(0, 1))
    return _centred(rewards, judged)[0] / (_root(_variance(centred, count, ddof, axis=(0, 1))) + epsilon)


def leave_one_out_normalised(rewards, *, ddof=1, epsilon=1e-4):
    """Leave-one-out advantages with mean 0 and deviation 1 over the batch: A = (a - mean(a)) / (std(a) + epsilon).

        a_g = r_g - sum_{h != g} r_h / (G - 1)

    ``RLOOTrainer`` with ``normalize_advantages=True``, https://github.com/huggingface/trl; the paper (Ahmadian et al.
    2024, https://arxiv.org/abs/2402.14740) does not normalise: ``leave_one_out``.

    Args:
      rewards: [P, G], G >= 2; NaN for an answer without verdict.
      ddof: in [0, 2), what is taken from the number of answers in the deviation.
      epsilon: > 0.

    Returns:
      [P, G] float32; 0 as well for the only answer of a group that was judged, which has no others to compare with.

    Raises:
      ValueError: as ``batch_normalised``.

    >>> print(leave_one_out_normalised(jnp.array([[1.0, 3.0], [2.0, 2.0]]), ddof=0).round(3))
    [[-1.414  1.414]
     [ 0.     0.   ]]
    """
    _check_spread(ddof, epsilon)
    centred, count = _centred(*_judged(rewards))
    compared = ~jnp.isnan(rewards) & (count > 1)
    return _over_the_batch(centred * (count / jnp.maximum(count - 1, 1)).astype(centred.dtype), compared, ddof, epsilon)


def reinforce_plus_plus_baseline(rewards, *, ddof=1, epsilon=1e-8):
    """REINFORCE++ with baseline: less the group's mean, then over the spread of the batch.

        a_g = r_g - mean(r)
        A_g = (a_g - mean(a)) / (std(a) + epsilon)              mean and std over all groups of the batch

    Hu et al. 2025, https://arxiv.org/abs/2501.03262. Unlike ``batch_normalised`` it divides by the deviation within
    the groups: how much the prompts differ in difficulty does not enter.

    Args:
      rewards: [P, G], G >= 2; NaN for an answer without verdict.
      ddof: in [0, 2), what is taken from the number of answers in the deviation.
      epsilon: > 0.

    Returns:
      [P, G] float32.

    Raises:
      ValueError: as ``batch_normalised``.

    >>> rewards = jnp.array([[1.0, 3.0], [-3.0, -1.0]])  # deviation 1 about the means of the groups
    >>> print(reinforce_plus_plus_baseline(rewards, ddof=0).round(3))
    [[-1.  1.]
     [-1.  1.]]
    """
    _check_spread(ddof, epsilon)
    rewards, judged = _judged(rewards)
    return _over_the_batch(_centred(rewards, judged)[0], judged, ddof, epsilon)


def reinforce_plus_plus(rewards, mask, *, gamma=1.0, ddof=1, epsilon=1e-8):
    """REINFORCE++: what is still to be earned from each token on, whitened over all tokens of the batch.

        R_t = sum_{s >= t} gamma^(s - t) r_s
        A_t = (R_t - mean(R)) / sqrt(var(R) + epsilon)          mean and var over the scored tokens

    Hu et al. 2025, https://arxiv.org/abs/2501.03262; r from ``kl_penalised_rewards`` and gamma = 1 give its
    A_t = r(x, y) - beta sum_{s >= t} KL_s.

    Args:
      rewards: [B, T], of tokens.
      mask: [B, T] bool, the scored tokens.
      gamma: in [0, 1], the discount a token.
      ddof: in [0, 2), what is taken from the number of tokens in the variance.
      epsilon: > 0.

    Returns:
      [B, T] float32; 0 where not scored.

    Raises:
      ValueError: the shapes disagree, or a number is out of range.

    >>> rewards, mask = jnp.array([[0.0, 1.0], [0.0, -1.0]]), jnp.ones((2, 2), bool)
    >>> print(reinforce_plus_plus(rewards, mask, ddof=0).round(3))
    [[ 1.  1.]
     [-1. -1.]]
    """
    return whiten(reward_to_go(rewards, mask, gamma=gamma), mask, ddof=ddof, epsilon=epsilon)


def _whitened(advantages, mask, ddof, epsilon):
    """Whitened advantages, and the mean that they had."""
    (x,) = weights.scored(mask, advantages=advantages)
    _check_spread(ddof, epsilon)
    there = jnp.asarray(mask, bool) & ~jnp.isnan(x)
    x = jnp.where(there, x, 0)
    centred, count = _centred(x, there, axis=(0, 1))
    return centred * jax.lax.rsqrt(_variance(centred, count, ddof, axis=(0, 1)) + epsilon), x.sum() / count, there


def whiten(advantages, mask, *, ddof=1, epsilon=1e-8):
    """Mean 0 and variance 1 over the scored tokens of the batch: w = (A - mean(A)) / sqrt(var(A) + epsilon).

    Huang et al. 2024 (The N+ Implementation Details of RLHF with PPO), https://arxiv.org/abs/2403.17031.

    Args:
      advantages: [B, T], or whatever else is to be whitened; a NaN that is scored gets 0 and is in no mean.
      mask: [B, T] bool, the scored tokens.
      ddof: in [0, 2), what is taken from the number of tokens in the variance; 1 as in PyTorch, TRL and verl.
      epsilon: > 0.

    Returns:
      [B, T] float32; 0 where not scored, and everywhere if all scored values are equal, or there is only one.

    Raises:
      ValueError: the shapes disagree, or a number is out of range.

    >>> print(whiten(jnp.array([[1.0, 2.0, 3.0, jnp.nan]]), jnp.array([[True, True, True, False]])))
    [[-1. 0. 1. 0.]]
    """
    return _whitened(advantages, mask, ddof, epsilon)[0]


def whiten_keeping_mean(advantages, mask, *, ddof=1, epsilon=1e-8):
    """Variance 1 over the scored tokens, the mean as it was: w = (A - mean(A)) / sqrt(var(A) + epsilon) + mean(A).

    For rewards, whose mean says whether an answer is worth anything at all. Huang et al. 2024,
    https://arxiv.org/abs/2403.17031; arguments as ``whiten``.

    >>> print(whiten_keeping_mean(jnp.array([[2.0, 4.0, 6.0, 9.0]]), jnp.array([[True, True, True, False]])))
    [[3. 4. 5. 0.]]
    """
    whitened, mean, there = _whitened(advantages, mask, ddof, epsilon)
    return jnp.where(there, whitened + mean, 0)
