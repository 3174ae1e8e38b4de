"""Rewards, returns and advantages of single tokens, each counted from the end of the row backwards.

Only the scored tokens are steps in time. What stands between them (the answer of a tool, padding) is stepped over: no
discount is counted for it, nothing is earned on it and no value is read from it, so a row with gaps gets what the row
without the gaps gets.
"""

import jax
import jax.numpy as jnp

from pt_jax import checks, divergences, weights


def _scan_back(step, after, *arrays):
    """``step(after, (x_t, ...)) -> (after, y_t)`` along the last axis of [B, T] arrays, from its end."""
    _, out = jax.lax.scan(step, after, tuple(x.T for x in arrays), reverse=True)
    return out.T


def _check_discounts(**numbers):
    for name, x in numbers.items():
        checks.between(name, x, 0.0, 1.0 + 1e-6)


def score_at_end(scores, mask):
    """The score of an answer as a reward of its last scored token: r_t = score if t = max{s: scored}, else 0.

    Stiennon et al. 2020, https://arxiv.org/abs/2009.01325: the reward model speaks once, at the end.

    Args:
      scores: [B], one number an answer.
      mask: [B, T] bool, the scored tokens.

    Returns:
      [B, T] float32; 0 where not scored; a row without scored tokens has no place for its score.

    Raises:
      ValueError: the shapes disagree, or scores are whole numbers.

    >>> mask = jnp.array([[True, True, False], [True, False, True]])
    >>> print(score_at_end(jnp.array([5.0, 7.0]), mask))
    [[0. 5. 0.]
     [0. 0. 7.]]
    """
    checks.shapes(scores=(scores, "B"), mask=(mask, "B T"))
    (scores,) = checks.floats(scores=scores)
    mask = jnp.asarray(mask, bool)
    last = mask & (jnp.cumsum(mask[:, ::-1], -1)[:, ::-1] == 1)
    return jnp.where(last, jnp.where(mask.any(-1), scores, 0)[:, None], 0)


def kl_penalised_rewards(scores, logps, ref_logps, mask, *, kl_coef=0.02, kl=divergences.k1):
    """Rewards of tokens: each pays for leaving the reference, the last one also earns the score.

        r_t = -kl_coef kl_t + [t is the last scored token] score,       kl_t = log p_t - log p_ref,t

    Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, equation 2; Ouyang et al. 2022 (InstructGPT),
    https://arxiv.org/abs/2203.02155, with a coefficient of 0.02.

    Args:
      scores: [B], one number an answer.
      logps: [B, T] of the tokens under the policy that sampled them, in nats.
      ref_logps: [B, T] under the frozen reference.
      mask: [B, T] bool, the scored tokens.
      kl_coef: >= 0.
      kl: ``(logps, ref_logps, mask) -> [B, T]``, one of ``divergences``; k1 there is unbiased inside a reward.

    Returns:
      [B, T] float32; 0 where not scored.

    Raises:
      ValueError: the shapes disagree, or kl_coef is negative.

    >>> logps, mask = jnp.array([[-1.0, -1.0]]), jnp.ones((1, 2), bool)
    >>> print(kl_penalised_rewards(jnp.array([5.0]), logps, logps - 1, mask, kl_coef=0.5))
    [[-0.5 4.5]]
    """
    checks.between("kl_coef", kl_coef, 0.0, float("inf"))
    return score_at_end(scores, mask) - kl_coef * kl(logps, ref_logps, mask)


def kl_penalised_scores(scores, logps, ref_logps, mask, *, kl_coef=0.05, kl=divergences.k1):
    """Scores of answers that pay for leaving the reference: R = score - kl_coef sum_t kl_t.

    Ahmadian et al. 2024 (RLOO), https://arxiv.org/abs/2402.14740, where a whole answer is one action; the same number
    as the sum over ``kl_penalised_rewards``, of which the arguments are.

    Args:
      scores: [B], one number an answer; NaN stays NaN.
      logps: [B, T] of the tokens under the policy that sampled them, in nats.
      ref_logps: [B, T] under the frozen reference.
      mask: [B, T] bool, the scored tokens.
      kl_coef: >= 0.
      kl: ``(logps, ref_logps, mask) -> [B, T]``, one of ``divergences``.

    Returns:
      [B] float32; reshaped to [P, G], the rewards of ``leave_one_out``.

    Raises:
      ValueError: the shapes disagree, or kl_coef is negative.

    >>> logps, mask = jnp.array([[-1.0, -1.0]]), jnp.ones((1, 2), bool)
    >>> print(kl_penalised_scores(jnp.array([5.0]), logps, logps - 1, mask, kl_coef=0.5))
    [4.]
    """
    checks.between("kl_coef", kl_coef, 0.0, float("inf"))
    checks.shapes(scores=(scores, "B"), mask=(mask, "B T"))
    (scores,) = checks.floats(scores=scores)
    return scores - kl_coef * kl(logps, ref_logps, mask).sum(-1)


def reward_to_go(rewards, mask, *, gamma=1.0):
    """What is still to be earned from each token on: R_t = sum_{s >= t} gamma^(s - t) r_s, over scored tokens.

    Williams 1992 (REINFORCE), https://doi.org/10.1007/BF00992696; Sutton & Barto, Reinforcement Learning, equation
    3.8.

    Args:
      rewards: [B, T], of tokens.
      mask: [B, T] bool, the scored tokens; time is counted in them.
      gamma: in [0, 1], the discount a token.

    Returns:
      [B, T] float32; 0 where not scored.

    Raises:
      ValueError: the shapes disagree, or gamma is out of range.

    >>> rewards, mask = jnp.array([[1.0, 9.0, 2.0, 4.0]]), jnp.array([[True, False, True, True]])
    >>> print(reward_to_go(rewards, mask, gamma=0.5))
    [[3. 0. 4. 4.]]
    """
    (rewards,) = weights.scored(mask, rewards=rewards)
    _check_discounts(gamma=gamma)

    def step(after, now):
        reward, scored = now
        here = jnp.where(scored, reward + gamma * after, after)
        return here, jnp.where(scored, here, 0)

    after = jnp.zeros(len(rewards), jnp.result_type(rewards, gamma))
    return _scan_back(step, after, rewards, jnp.asarray(mask, bool))


def _gae(rewards, values, last, mask, gamma, lam):
    """Advantages; ``last`` [B] is the value after the last scored token, ``lam`` a number or one a row, [B]."""
    dtype = jnp.result_type(rewards, values, last, gamma, lam)

    def step(after, now):
        next_value, next_advantage = after
        reward, value, scored = now
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        after = jnp.where(scored, value, next_value), jnp.where(scored, advantage, next_advantage)
        return after, jnp.where(scored, advantage, 0)

    after = jnp.asarray(last, dtype), jnp.zeros(len(rewards), dtype)
    return _scan_back(step, after, rewards.astype(dtype), values.astype(dtype), jnp.asarray(mask, bool))


def gae(rewards, values, mask, *, gamma=1.0, lam=0.95):
    """Generalised advantage estimation: advantages and the returns that the values are trained on.

        d_t = r_t + gamma V_{t+1} - V_t,   A_t = d_t + gamma lam A_{t+1},   R_t = A_t + V_t

    where t + 1 is the next scored token, and V and A are 0 after the last one.

    Schulman et al. 2016, https://arxiv.org/abs/1506.02438, equation 16. lam = 1 is what is really earned less the
    value (no bias), lam = 0 the surprise of one step (least variance).

    Args:
      rewards: [B, T], of tokens, for example of ``kl_penalised_rewards``.
      values: [B, T], what the critic expects to be earned from this token on, before it is sampled.
      mask: [B, T] bool, the scored tokens; time is counted in them.
      gamma: in [0, 1], the discount a token.
      lam: in [0, 1].

    Returns:
      Advantages and returns, [B, T] float32 each; 0 where not scored.

    Raises:
      ValueError: the shapes disagree, or a number is out of range.

    >>> rewards, values = jnp.array([[0.0, 9.0, 1.0]]), jnp.array([[0.25, 9.0, 0.5]])
    >>> advantages, returns = gae(rewards, values, jnp.array([[True, False, True]]), lam=0.5)
    >>> print(advantages, returns)  # 0.5 at the end; 0.25 + 0.5 0.5 before it
    [[0.5 0. 0.5]] [[0.75 0. 1. ]]
    """
    rewards, values = weights.scored(mask, rewards=rewards, values=values)
    _check_discounts(gamma=gamma, lam=lam)
    advantages = _gae(rewards, values, jnp.zeros(len(rewards), rewards.dtype), mask, gamma, lam)
    return advantages, advantages + values


def gae_bootstrapped(rewards, values, bootstrap, mask, *, gamma=1.0, lam=0.95):
    """``gae`` of rows that were cut off: d_t = r_t + gamma V_{t+1} - V_t with V = bootstrap after the last token.

    Schulman et al. 2016, https://arxiv.org/abs/1506.02438, equation 16. An answer that reached the length limit was
    not over; to train on a 0 after it would teach the critic that long answers end in nothing.

    Args:
      rewards: [B, T] as in ``gae``.
      values: [B, T] as in ``gae``.
      bootstrap: [B], what the critic expects after the last scored token; 0 where the answer ended by itself.
      mask: [B, T] bool, the scored tokens.
      gamma: in [0, 1], the discount a token.
      lam: in [0, 1].

    Returns:
      Advantages and returns, [B, T] float32 each; 0 where not scored.

    Raises:
      ValueError: the shapes disagree, or a number is out of range.

    >>> one = jnp.ones((1, 1))
    >>> print(gae_bootstrapped(one, 3 * one, jnp.array([4.0]), one == 1, gamma=0.5)[0])  # 1 + 0.5 4 - 3
    [[0.]]
    """
    rewards, values = weights.scored(mask, rewards=rewards, values=values)
    checks.shapes(bootstrap=(bootstrap, "B"), mask=(mask, "B T"))
    (bootstrap,) = checks.floats(bootstrap=bootstrap)
    _check_discounts(gamma=gamma, lam=lam)
    # a row without scored tokens does not exist, so neither does what comes after it
    advantages = _gae(rewards, values, jnp.where(jnp.any(mask, -1), bootstrap, 0), mask, gamma, lam)
    return advantages, advantages + values


def length_adaptive_gae(rewards, values, mask, *, gamma=1.0, alpha=0.05):
    """VAPO's GAE: lambda grows with the length l of the answer, and the critic learns from what was really earned.

        lam = max(0, 1 - 1 / (alpha l))
        A = GAE with lam,   R = GAE with 1, plus V

    so that the weights lam^t of the steps ahead sum to alpha l: a fixed 0.95 hears of the score of an answer of 1000
    tokens only in its last 60. Below 1 / alpha tokens, where the formula would be negative, lam is 0.

    Yue et al. 2025 (VAPO), https://arxiv.org/abs/2504.05118; the critic's lambda of 1 is the decoupled GAE of Yuan et
    al. 2025 (VC-PPO), https://arxiv.org/abs/2503.01491.

    Args:
      rewards: [B, T] as in ``gae``.
      values: [B, T] as in ``gae``.
      mask: [B, T] bool, the scored tokens; l is how many a row has.
      gamma: in [0, 1], the discount a token.
      alpha: > 0.

    Returns:
      Advantages and returns, [B, T] float32 each; 0 where not scored.

    Raises:
      ValueError: the shapes disagree, or a number is out of range.

    >>> rewards, values, mask = jnp.array([[0.0, 1.0]]), jnp.array([[0.25, 0.5]]), jnp.ones((1, 2), bool)
    >>> advantages, returns = length_adaptive_gae(rewards, values, mask, alpha=1.0)  # lam = 1 - 1/2
    >>> print(advantages, returns)
    [[0.5 0.5]] [[1. 1.]]
    """
    rewards, values = weights.scored(mask, rewards=rewards, values=values)
    _check_discounts(gamma=gamma)
    checks.positive("alpha", alpha)
    length = jnp.maximum(jnp.sum(mask, -1), 1).astype(rewards.dtype)
    lam = jnp.maximum(1 - 1 / (alpha * length), 0)
    advantages = _gae(rewards, values, jnp.zeros(len(rewards), rewards.dtype), mask, gamma, lam)
    return advantages, reward_to_go(rewards, mask, gamma=gamma)
