"""Several reward functions for one answer: [P, G, F], one column a function, NaN where a function has no verdict."""

import jax.numpy as jnp

from pt_jax import checks
from pt_jax.advantages.groups import _centred, _check_spread, _root, _variance


def _terms(reward_terms, reward_weights):
    """Both in one float type, and which terms are numbers, after the checks."""
    checks.shapes(reward_terms=(reward_terms, "P G F"), reward_weights=(reward_weights, "F"))
    dtype = jnp.promote_types(jnp.result_type(reward_terms), jnp.float32)
    reward_terms = jnp.asarray(reward_terms, dtype)
    return reward_terms, jnp.asarray(reward_weights, dtype)[None, None], ~jnp.isnan(reward_terms)


def summed_rewards(reward_terms, reward_weights):
    """The weighted sum of several rewards, over those that were given: r_g = sum_f w_f r_gf.

    A function without verdict adds nothing, and an answer without any verdict keeps NaN, so that the advantage
    functions leave it out. (https://github.com/huggingface/trl does the same.)

    Args:
      reward_terms: [P, G, F], of F reward functions; NaN where a function has no verdict.
      reward_weights: [F].

    Returns:
      [P, G] float32: rewards for the functions of groups; NaN where no function had a verdict.

    Raises:
      ValueError: the shapes disagree.

    >>> terms = jnp.array([[[1.0, 3.0], [1.0, jnp.nan], [jnp.nan, jnp.nan]]])
    >>> print(summed_rewards(terms, jnp.array([1.0, 0.5])))
    [[2.5 1.  nan]]
    """
    reward_terms, reward_weights, given = _terms(reward_terms, reward_weights)
    total = (jnp.where(given, reward_terms, 0) * reward_weights).sum(-1)
    return jnp.where(given.any(-1), total, jnp.nan)


def per_reward_normalised(reward_terms, reward_weights, *, ddof=1, epsilon=1e-4):
    """GDPO: each reward relative to its own group first, then their sum over the spread of the batch.

        a_gf = (r_gf - mean_g r_gf) / (std_g r_gf + epsilon)
        s_g = sum_f w_f a_gf
        A_g = (s_g - mean(s)) / (std(s) + epsilon)              mean and std over all groups of the batch

    Normalised after the sum, a reward of small spread would vanish beside one of large spread, and different pairs of
    rewards would get equal advantages.

    Liu et al. 2026 (GDPO), https://arxiv.org/abs/2601.05242; ``multi_objective_aggregation="normalize_then_sum"`` of
    TRL, with its ddof and epsilon.

    Args:
      reward_terms: [P, G, F] as in ``summed_rewards``; G >= 2.
      reward_weights: [F].
      ddof: in [0, 2), what is taken from the number of answers in both deviations.
      epsilon: > 0.

    Returns:
      [P, G] float32; 0 where no function had a verdict.

    Raises:
      ValueError: the shapes disagree, a group is a single answer, or a number is out of range.

    The second reward has a hundredth of the first's spread, and counts three quarters of it, as its weight says: the
    sums are -1, 1, -7 and 7, of which the deviation is 5.

    >>> terms = jnp.array([[[0.0, 0.01], [1.0, 0.0]], [[0.0, 0.0], [1.0, 0.01]]])
    >>> print((5 * per_reward_normalised(terms, jnp.array([4.0, 3.0]), ddof=0, epsilon=1e-9)).round())
    [[-1.  1.]
     [-7.  7.]]
    """
    _check_spread(ddof, epsilon)
    reward_terms, reward_weights, given = _terms(reward_terms, reward_weights)
    if reward_terms.shape[1] < 2:
        raise ValueError(f"reward_terms has groups of {reward_terms.shape[1]}: a group needs at least 2 answers")
    centred, count = _centred(reward_terms, given, axis=1)
    relative = centred / (_root(_variance(centred, count, ddof, axis=1)) + epsilon)
    judged = given.any(-1)
    centred, count = _centred((relative * reward_weights).sum(-1), judged, axis=(0, 1))
    return centred / (_root(_variance(centred, count, ddof, axis=(0, 1))) + epsilon)
