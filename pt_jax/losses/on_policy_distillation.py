"""Distillation on tokens that the student drew, from nothing but their log-probabilities under student and teacher.

The teacher scores what the student wrote; log t - log s of a token is its reward, and the student follows the policy
gradient. The advantages go into any objective of ``objectives``; ``sampled_reverse_kl`` and ``iw_opd`` are losses that
need none. With tokens drawn from the student, ``sampled_reverse_kl`` has exactly the gradient of
``distillation.reverse_kl``, on average, without anyone's logits (Schulman 2020, http://joschu.net/blog/kl-approx.html);
its value is no divergence: show ``divergences.k3`` instead.
"""

import jax
import jax.numpy as jnp

from pt_jax import checks, weights


def _discount(gamma):
    checks.share("gamma", gamma)


def opd_advantages(logps, teacher_logps, mask):
    """On-policy distillation as a reward, a token: how much likelier the teacher finds it than the student.

        A = log t - log s,   without gradient

    The mean over tokens of the student is -KL(student || teacher) (k1 in the reward). Lu and Thinking Machines Lab
    2025, https://thinkingmachines.ai/blog/on-policy-distillation/.

    Args:
      logps: [B, T] of the tokens under the student that drew them, in nats.
      teacher_logps: [B, T] under the teacher, in nats.
      mask: [B, T] bool, the scored tokens.

    Returns:
      [B, T] float32, in nats; 0 where not scored. No gradient flows through it.

    Raises:
      ValueError: the shapes disagree.

    >>> logps, teacher_logps = jnp.log(jnp.array([[[0.5, 0.5]], [[1.0, 0.25]]]))
    >>> print(opd_advantages(logps, teacher_logps, jnp.array([[True, True]])).round(4))  # log 2, -log 2
    [[ 0.6931 -0.6931]]
    """
    logps, teacher_logps = weights.scored(mask, logps=logps, teacher_logps=teacher_logps)
    return jax.lax.stop_gradient(weights.log_ratio(teacher_logps, logps))


def sampled_reverse_kl(logps, teacher_logps, mask):
    """The reverse KL's gradient from one token: loss = stop_gradient(log s - log t) log s.

    The sampled-token form of SDPO (Hübotter et al. 2026, https://arxiv.org/abs/2601.20802), and what ``opd_advantages``
    is with REINFORCE. Its gradient is that of ``divergences.k2``; its value means nothing. Arguments as
    ``opd_advantages``; no gradient flows into ``teacher_logps``.

    >>> logps, teacher_logps = jnp.log(jnp.array([[[0.5]], [[1.0]]]))
    >>> print(sampled_reverse_kl(logps, teacher_logps, jnp.array([[True]])).round(4))  # (log 2)^2
    [[0.4805]]
    """
    (scored,) = weights.scored(mask, logps=logps)
    return -weights.times(opd_advantages(logps, teacher_logps, mask), scored)


def clipped_importance(losses, logps, old_logps, mask, *, clip=2.0):
    """A loss a token, made good for its token having been drawn by an older student, within bounds.

        out = losses min(exp(logps - old_logps), clip),   the factor without gradient

    As SDPO uses it (Hübotter et al. 2026, https://arxiv.org/abs/2601.20802), for any loss of distillation.

    Args:
      losses: [B, T], a loss a token.
      logps: [B, T] of the tokens under the student that learns, in nats; no gradient flows into it.
      old_logps: [B, T] under the student that drew them; no gradient either.
      mask: [B, T] bool, the scored tokens.
      clip: > 0, the largest factor.

    Returns:
      [B, T] float32; 0 where not scored.

    Raises:
      ValueError: the shapes disagree, or a number is out of range.

    >>> losses, ratio = jnp.array([[1.0, 1.0]]), jnp.array([[0.5, 5.0]])
    >>> print(clipped_importance(losses, jnp.log(ratio), jnp.zeros((1, 2)), jnp.array([[True, True]])))
    [[0.5 2. ]]
    """
    losses, logps, old_logps = weights.scored(mask, losses=losses, logps=logps, old_logps=old_logps)
    checks.positive("clip", clip)
    # the bound is taken of the logarithm, so that no ratio overflows
    return losses * jax.lax.stop_gradient(jnp.exp(jnp.minimum(weights.log_ratio(logps, old_logps), jnp.log(clip))))


# ---- MiniLLM


def _discounted_sums(x, mask, gamma):
    """sum_{i >= t} gamma^(i - t) x_i, where i - t counts scored tokens alone."""

    def step(later, now):
        value, scored = now
        later = jnp.where(scored, value + gamma * later, later)
        return later, later

    x = jnp.asarray(x)
    _, sums = jax.lax.scan(step, jnp.zeros_like(x[:, 0]), (x.T, jnp.asarray(mask).T), reverse=True)
    return weights.zero_unscored(mask, sums.T)[0]


def reward_to_go(logps, teacher_logps, mask, *, gamma=1.0):
    """MiniLLM's return: the log-ratios of a token and of all that the student wrote after it.

        R_t = sum_{i >= t} gamma^(i - t) (log t_i - log s_i),   without gradient

    A token earns what it leads to; ``opd_advantages`` is gamma = 0, and the paper has gamma = 1. Tokens that are not
    scored are stepped over. Gu et al. 2023 (MiniLLM), https://arxiv.org/abs/2306.08543, equation 2; their R_t - 1 has
    the same gradient on average. For their single-step decomposition, take away ``opd_advantages``, which are i = t,
    and add ``distillation.reverse_kl``, which is exact.

    Args:
      logps: [B, T] of the tokens under the student that drew them, in nats.
      teacher_logps: [B, T] under the teacher, in nats.
      mask: [B, T] bool, the scored tokens.
      gamma: in [0, 1], the discount a token.

    Returns:
      [B, T] float32, in nats; 0 where not scored. No gradient flows through it.

    Raises:
      ValueError: the shapes disagree, or a number is out of range.

    >>> gaps = jnp.array([[1.0, 2.0, 4.0]])
    >>> print(reward_to_go(jnp.zeros((1, 3)), gaps, jnp.array([[True, True, True]]), gamma=0.5))
    [[3. 4. 4.]]
    """
    _discount(gamma)
    return _discounted_sums(opd_advantages(logps, teacher_logps, mask), mask, gamma)


def mean_reward_to_go(logps, teacher_logps, mask, *, gamma=1.0):
    """MiniLLM's return for each token that is left, so that it does not reward being short.

        R_t = sum_{i >= t} gamma^(i - t) (log t_i - log s_i) / sum_{i >= t} gamma^(i - t)

    The length normalisation of Gu et al. 2023 (MiniLLM), https://arxiv.org/abs/2306.08543, section 2.2, with a
    discount; arguments as ``reward_to_go``.

    >>> gaps = jnp.array([[1.0, 2.0, 6.0]])
    >>> print(mean_reward_to_go(jnp.zeros((1, 3)), gaps, jnp.array([[True, True, True]])))
    [[3. 4. 6.]]
    """
    sums = reward_to_go(logps, teacher_logps, mask, gamma=gamma)
    left = _discounted_sums(jnp.ones_like(sums), mask, gamma)
    return sums / jnp.maximum(left, 1)


def _trl_powers(mask, gamma, dtype):
    """gamma^(column from the first scored one); 0 before it."""
    mask = jnp.asarray(mask)
    column = jnp.arange(mask.shape[1])[None] - jnp.argmax(mask, 1, keepdims=True)
    return jnp.where(column < 0, 0, jnp.power(jnp.asarray(gamma, dtype), jnp.maximum(column, 0)))


def _from_here_on(x):
    return jnp.cumsum(x[:, ::-1], 1)[:, ::-1]


def trl_reward_to_go(logps, teacher_logps, mask, *, gamma=1.0):
    """TRL's ``reward_to_go``: discounted from the start of the answer instead of from the token.

        R_t = sum_{i >= t} gamma^i (log t_i - log s_i)   for gamma > 0;   log t_t - log s_t   for gamma = 0

    with i counting columns from the first scored one. The gradient of a late token shrinks by gamma^t. TRL 1.10,
    https://github.com/huggingface/trl, ``MiniLLMTrainer._compute_advantage``; arguments as ``reward_to_go``.

    >>> gaps = jnp.array([[1.0, 2.0, 4.0]])
    >>> print(trl_reward_to_go(jnp.zeros((1, 3)), gaps, jnp.array([[True, True, True]]), gamma=0.5))
    [[3. 2. 1.]]
    """
    _discount(gamma)
    advantages = opd_advantages(logps, teacher_logps, mask)
    sums = _from_here_on(advantages * _trl_powers(mask, gamma, advantages.dtype))
    return weights.zero_unscored(mask, jnp.where(gamma > 0, sums, advantages))[0]


def trl_mean_reward_to_go(logps, teacher_logps, mask, *, gamma=1.0):
    """TRL's ``mean_reward_to_go``: each column of padding counts as a ten-thousandth of a token.

        R_t = sum_{i >= t} gamma^i (log t_i - log s_i) / sum_{i >= t} gamma^i (1 if scored else 0.0001)

    So the value depends a little on how far the batch is padded. TRL 1.10, https://github.com/huggingface/trl,
    ``MiniLLMTrainer._compute_advantage``; arguments as ``reward_to_go``.

    >>> gaps = jnp.array([[1.0, 2.0, 6.0]])
    >>> print(trl_mean_reward_to_go(jnp.zeros((1, 3)), gaps, jnp.array([[True, True, True]])))
    [[3. 4. 6.]]
    """
    sums = trl_reward_to_go(logps, teacher_logps, mask, gamma=gamma)
    length = _from_here_on(jnp.where(mask, 1, 1e-4) * _trl_powers(mask, gamma, sums.dtype))
    return jnp.where((length > 0) & (gamma > 0), sums / jnp.where(length > 0, length, 1), sums)


# ---- importance-weighted on-policy distillation


def iw_opd_advantages(old_logps, teacher_logps, mask, *, gamma=0.5):
    """``opd_advantages``, with more weight where student and teacher have not parted yet.

        a = log t - log s_old
        A_t = (1 + gamma (1 - sum_{i < t} |a_i| / sum_i |a_i|)) a_t,   without gradient

    The weight falls from 1 + gamma at the first token of a row to about 1 at the last. Xie et al. 2026 (IW-OPD),
    https://arxiv.org/abs/2606.22600; the default of gamma is TRL's.

    Args:
      old_logps: [B, T] of the tokens under the student that drew them, in nats.
      teacher_logps: [B, T] under the teacher, in nats.
      mask: [B, T] bool, the scored tokens.
      gamma: >= 0; 0 is ``opd_advantages``.

    Returns:
      [B, T] float32, in nats; 0 where not scored. No gradient flows through it.

    Raises:
      ValueError: the shapes disagree, or a number is out of range.

    >>> gaps = jnp.array([[1.0, 2.0, -1.0]])  # of the distance of 4, 0, 1 and 3 lie before
    >>> print(iw_opd_advantages(jnp.zeros((1, 3)), gaps, jnp.array([[True, True, True]]), gamma=1.0))
    [[ 2. 3.5 -1.25]]
    """
    (old_logps,) = weights.scored(mask, old_logps=old_logps)
    checks.between("gamma", gamma, 0.0, float("inf"))
    advantages = opd_advantages(old_logps, teacher_logps, mask)
    distance = jnp.abs(advantages)
    before, total = jnp.cumsum(distance, 1) - distance, distance.sum(1, keepdims=True)
    return (1 + gamma * (1 - before / jnp.where(total > 0, total, 1))) * advantages


def iw_opd(logps, old_logps, teacher_logps, mask, *, gamma=0.5):
    """Importance-weighted on-policy distillation, a token: loss = -A log s, with A of ``iw_opd_advantages``.

    Xie et al. 2026, https://arxiv.org/abs/2606.22600.

    Args:
      logps: [B, T] of the tokens under the student that learns, in nats.
      old_logps: [B, T] under the student that drew them; ``logps`` itself when that is the same. No gradient.
      teacher_logps: [B, T] under the teacher; no gradient.
      mask: [B, T] bool, the scored tokens.
      gamma: >= 0.

    Returns:
      [B, T] float32; 0 where not scored. Only its gradient means something.

    Raises:
      ValueError: the shapes disagree, or a number is out of range.

    >>> logps, mask = jnp.array([[-1.0, -2.0]]), jnp.array([[True, True]])
    >>> print(iw_opd(logps, logps, jnp.zeros((1, 2)), mask, gamma=3.0))  # weights 4 and 3, log-ratios 1 and 2
    [[ 4. 12.]]
    """
    (scored,) = weights.scored(mask, logps=logps)
    return -weights.times(iw_opd_advantages(old_logps, teacher_logps, mask, gamma=gamma), scored)
