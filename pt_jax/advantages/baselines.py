"""Advantages of groups by other baselines than the mean: a greedy answer, an optimal one, the best of k.

As in ``groups``, a reward of NaN takes its own answer out, and the others get what they would have got without it.
"""

import jax.numpy as jnp

from pt_jax import checks
from pt_jax.advantages.groups import _judged, _root, _shifted


def greedy_baseline(rewards, greedy_rewards):
    """ReMax: how much better a sampled answer did than the most likely one: A_g = r_g - r_greedy.

    Li et al. 2023, https://arxiv.org/abs/2310.10505. No group is needed: one sample a prompt will do.

    Args:
      rewards: [P, G], of sampled answers; G >= 1; NaN for an answer without verdict.
      greedy_rewards: [P], of the answer decoded greedily; where it is NaN there is nothing to compare with, and the
        advantages of the prompt are 0.

    Returns:
      [P, G] float32.

    Raises:
      ValueError: the shapes disagree.

    >>> print(greedy_baseline(jnp.array([[0.0, 1.0], [1.0, jnp.nan]]), jnp.array([0.5, 0.0])))
    [[-0.5  0.5]
     [ 1.   0. ]]
    """
    checks.shapes(rewards=(rewards, "P G"), greedy_rewards=(greedy_rewards, "P"))
    rewards, judged = _judged(rewards, least=1)
    greedy = jnp.asarray(greedy_rewards, rewards.dtype)[:, None]
    there = judged & ~jnp.isnan(greedy)
    return jnp.where(there, rewards, 0) - jnp.where(there, greedy, 0)


def optimal_baseline(rewards, lengths):
    """OPO: a long answer counts more in the baseline: A_g = r_g - sum_h l_h r_h / sum_h l_h.

    Hao et al. 2025, https://arxiv.org/abs/2505.23585. The baseline of least variance weighs each reward by the squared
    norm of its gradient; where the gradients of tokens are as good as orthogonal, that is in proportion to the length.

    Args:
      rewards: [P, G], G >= 2; NaN for an answer without verdict.
      lengths: [P, G] > 0, how many tokens were sampled for each answer.

    Returns:
      [P, G] float32.

    Raises:
      ValueError: the shapes disagree, or a group is a single answer.

    >>> print(optimal_baseline(jnp.array([[0.0, 1.0]]), jnp.array([[3, 1]])))  # the baseline is 1/4
    [[-0.25 0.75]]
    """
    checks.shapes(rewards=(rewards, "P G"), lengths=(lengths, "P G"))
    rewards, judged = _judged(rewards)
    shifted = _shifted(rewards, judged)
    share = jnp.where(judged, jnp.asarray(lengths, rewards.dtype), 0)
    share = share / jnp.maximum(share.sum(-1, keepdims=True), jnp.finfo(share.dtype).tiny)
    return jnp.where(judged, shifted - (share * shifted).sum(-1, keepdims=True), 0)


def _best_of_k(rank, count, k):
    """How the best of k answers drawn without return is spread over ranks 0 (best), 1, ..., count - 1.

    Returns two arrays like ``rank``: the chance that the best of k is of this rank, given that the one of this rank
    is drawn, and the chance of the same given that another one of lower rank is drawn:

        own_j = C(j, k - 1) / C(n - 1, k - 1),   other_j = C(j - 1, k - 2) / C(n - 1, k - 1),   j answers are lower

    as products along the ranks, since a binomial coefficient overflows float32 from n = 130 on.
    """
    lower = count - 1 - rank
    step = jnp.where(lower >= 1, (lower - (k - 1)) / jnp.maximum(lower, 1), 0)
    own = jnp.cumprod(jnp.concatenate([jnp.ones_like(step[:, :1]), jnp.maximum(step, 0)[:, :-1]], -1), -1)
    return own, own * (k - 1) / jnp.maximum(lower, 1)


def pass_at_k(rewards, *, k=4):
    """Pass@k training: what an answer adds to the best of k, in deviations of the best of k.

        R_S = max_{h in S} r_h                                  for every set S of k answers of the group
        A_g = (mean_{S with g} R_S - mean_S R_S) / std_S R_S    and 0 where no set is better than another

    Chen et al. 2025 (Pass@k Training), https://arxiv.org/abs/2508.10751, whose analytical advantages for rewards of
    0 and 1 this equals: with N answers of which M are wrong, R = 1 - C(M, k) / C(N, k) and s = sqrt(R (1 - R)), a
    right answer gets (1 - R) / s and a wrong one (1 - R - C(M - 1, k - 1) / C(N - 1, k - 1)) / s. For other rewards
    the means over sets come from the order of the rewards, as in Walder & Karkhanis 2025 (PKPO),
    https://arxiv.org/abs/2505.15201. With k = 1 it is ``group_relative_deepseek``.

    Args:
      rewards: [P, G], G >= 2; NaN for an answer without verdict; a group with fewer than k verdicts gets 0.
      k: >= 1, a whole number, how many answers may be tried.

    Returns:
      [P, G] float32; every row sums to 0.

    Raises:
      ValueError: rewards is not of two axes, a group is a single answer, or k is below 1.

    One right answer among three, of which two may be tried: the sets are right 2 times in 3.

    >>> print(pass_at_k(jnp.array([[1.0, 0.0, 0.0]]), k=2).round(3))  # (1 - 2/3) / s, (1/2 - 2/3) / s, s^2 = 2/9
    [[ 0.707 -0.354 -0.354]]
    """
    checks.between("k", k, 1.0, float("inf"))
    rewards, judged = _judged(rewards)
    # Counted from the best one down, so that sets of equal reward differ by exactly 0.
    lost = _shifted(-rewards, judged)
    order = jnp.argsort(jnp.where(judged, lost, jnp.inf), axis=-1)
    lost = jnp.take_along_axis(lost, order, -1)
    count = judged.sum(-1, keepdims=True)
    rank = jnp.arange(lost.shape[-1])[None]
    real = rank < count
    own, other = (jnp.where(real, x, 0) for x in _best_of_k(rank, count, jnp.asarray(k, lost.dtype)))
    chance = own * k / jnp.maximum(count, 1)  # C(j, k - 1) / C(n, k)
    mean = (chance * lost).sum(-1, keepdims=True)
    deviation = _root((chance * jnp.square(lost - mean)).sum(-1, keepdims=True))
    better = jnp.cumsum(other * lost, -1) - other * lost  # the best is one of those above
    gain = jnp.where(real & (count >= k), mean - (own * lost + better), 0) / jnp.where(deviation > 0, deviation, 1)
    return jnp.take_along_axis(gain, jnp.argsort(order, axis=-1), -1).astype(lost.dtype)
