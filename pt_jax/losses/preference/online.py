"""Preferences among answers that the policy has just sampled, and off-policy pairs weighted as if it had.

======================  ==========================================================================================
``best_against_worst``  which of a prompt's answers are the pair: online DPO is ``dpo`` on it
``wpo_weights``         how likely the policy itself would say this answer: a weight of a pair collected by others
``xpo``                 online DPO with a bonus for what the reference would not say
``nash_md``             policy gradient on win rates against a mixture of the policy and the reference
``a2po``                regression of the log-ratio on the optimal advantage, which the reference's samples give
======================  ==========================================================================================
"""

import jax
import jax.numpy as jnp

from pt_jax import checks, weights
from pt_jax.losses.preference.paired import dpo, implicit_reward


def best_against_worst(rewards):
    """Which answers of a group make its pair: +1 for the best, -1 for the worst, 0 for all others.

        signs_g = [g = the first argmax of r] - [g = the last argmin of r]

    Guo et al. 2024 (online DPO), https://arxiv.org/abs/2402.04792, for two answers a prompt: the first is chosen where
    r_1 >= r_2. Equal rewards make a pair nonetheless, as in TRL; a weight of 0 leaves such groups out.

    Args:
      rewards: [P, G], one row a prompt, one column a sampled answer; G >= 2; NaN for an answer without verdict.

    Returns:
      [P, G] float32; a row of zeros where fewer than two answers have a verdict.

    Raises:
      ValueError: rewards is not of two axes, or a group is a single answer.

    With sums of log-probabilities [P, G], the chosen ones are ``jnp.where(signs > 0, sums, 0).sum(-1)``.

    >>> print(best_against_worst(jnp.array([[0.3, 0.3, 0.3], [0.1, jnp.nan, 0.9], [jnp.nan, jnp.nan, 2.0]])))
    [[ 1.  0. -1.]
     [-1.  0.  1.]
     [ 0.  0.  0.]]
    """
    groups = checks.shapes(rewards=(rewards, "P G"))["G"]
    if groups < 2:
        raise ValueError(f"rewards has groups of {groups}: a group needs at least 2 answers to be compared")
    (rewards,) = checks.floats(rewards=rewards)
    judged = ~jnp.isnan(rewards)
    best = jnp.argmax(jnp.where(judged, rewards, -jnp.inf), -1)
    worst = groups - 1 - jnp.argmin(jnp.where(judged, rewards, jnp.inf)[:, ::-1], -1)
    signs = jax.nn.one_hot(best, groups, dtype=rewards.dtype) - jax.nn.one_hot(worst, groups, dtype=rewards.dtype)
    return jnp.where(judged.sum(-1, keepdims=True) >= 2, signs, 0)


def wpo_weights(logps, log_sum_sq_probs, mask):
    """How much an answer is like one of the policy's own: the weight that WPO gives it, one value a row.

        w = exp(mean_t(logps - log sum_v p_v^2)),   without gradient

    Zhou et al. 2024, https://arxiv.org/abs/2406.11827, equation 2 with "sampled alignment": a token is measured by the
    probability that two samples agree, so that answers which the policy would sample weigh 1 on average whatever its
    entropy. A pair's loss is multiplied by the weights of both answers.

    Args:
      logps: [B, T] under the policy, in nats.
      log_sum_sq_probs: [B, T] log sum_v p_v^2 of the policy's distribution that the token comes from.
      mask: [B, T] bool, the scored tokens.

    Returns:
      [B] float32, > 0; 1 for a row without scored tokens. No gradient flows.

    Raises:
      ValueError: the shapes disagree.

    A uniform distribution over four tokens: p is 1/4 and so is the sum of squares.

    >>> quarter = jnp.full((1, 2), jnp.log(0.25))
    >>> print(wpo_weights(quarter, quarter, jnp.ones((1, 2), bool)))
    [1.]
    """
    logps, log_sum_sq_probs = weights.scored(mask, logps=logps, log_sum_sq_probs=log_sum_sq_probs)
    length = jnp.maximum(jnp.asarray(mask, logps.dtype).sum(-1), 1)
    return jax.lax.stop_gradient(jnp.exp((logps - log_sum_sq_probs).sum(-1) / length))


def xpo_bonus(from_reference, *, alpha=5e-6):
    """What XPO adds to a preference loss: alpha log p(y|x) of answers y that the reference sampled.

        bonus = alpha from_reference

    Less probability for what the reference says already is more for what nobody has tried: optimism in the face of
    uncertainty. Xie et al. 2024, https://arxiv.org/abs/2405.21046, algorithm 1.

    Args:
      from_reference: [B] summed log-probability under the policy, in nats, of an answer sampled from the reference.
      alpha: > 0.

    Returns:
      [B] float32.

    Raises:
      ValueError: alpha is not above 0.

    >>> print(xpo_bonus(jnp.array([-20.0]), alpha=0.01))
    [-0.2]
    """
    (from_reference,) = checks.rows(from_reference=from_reference)
    checks.positive("alpha", alpha)
    return alpha * from_reference


def xpo(chosen, rejected, ref_chosen, ref_rejected, from_reference, *, beta=0.1, alpha=5e-6):
    """Exploratory preference optimisation: online DPO with a bonus for going where the reference does not.

        loss = dpo(chosen, rejected, ref_chosen, ref_rejected) + alpha from_reference

    Xie et al. 2024, https://arxiv.org/abs/2405.21046, algorithm 1. A pair is one answer of the policy and one of the
    reference, in the order of their rewards; the latter is the answer of the bonus as well. For TRL's ``ipo`` variant
    add ``xpo_bonus`` to ``ipo``.

    Args:
      chosen, rejected, ref_chosen, ref_rejected: as in ``dpo``.
      from_reference: [B] the policy's log-probability, in nats, of the one that the reference sampled.
      beta: > 0.
      alpha: > 0, the weight of the bonus.

    Returns:
      [B] float32.

    Raises:
      ValueError: the shapes disagree, or a number is out of range.

    >>> zero = jnp.zeros(1)
    >>> print(xpo(zero, zero, zero, zero, jnp.array([-20.0]), alpha=0.01).round(4))  # log 2 - 0.2
    [0.4931]
    """
    checks.rows(chosen=chosen, from_reference=from_reference)
    return dpo(chosen, rejected, ref_chosen, ref_rejected, beta=beta) + xpo_bonus(from_reference, alpha=alpha)


def nash_md(logps, ref_logps, win_rates, *, beta=0.1):
    """Nash-MD's policy gradient on the game "my answer against a mixture of mine and the reference's", one value a row.

        A = win_rate - 1/2 - beta (logps - ref_logps),   without gradient
        loss = -A logps

    Munos et al. 2023, https://arxiv.org/abs/2312.00886, section 7, where beta is called tau: REINFORCE with the KL to
    the reference in the reward. The opponent's answer comes from the policy proportional to p^(1 - m) p_ref^m, which is
    a mixture of logits. The gradient matters, the value does not.

    Args:
      logps: [B] summed log-probability under the policy, in nats, of an answer that it sampled.
      ref_logps: [B] the same under the reference.
      win_rates: [B] in [0, 1], the probability that the answer is preferred to the opponent's.
      beta: >= 0, the price of a nat away from the reference.

    Returns:
      [B] float32.

    Raises:
      ValueError: the shapes disagree, or beta is below 0.

    >>> print(nash_md(jnp.array([-2.0]), jnp.array([-2.0]), jnp.array([0.75])))  # 1/4 of 2 nats
    [0.5]
    """
    logps, ref_logps, win_rates = checks.rows(logps=logps, ref_logps=ref_logps, win_rates=win_rates)
    checks.between("beta", beta, 0.0, float("inf"))
    advantages = win_rates - 0.5 - beta * (logps - ref_logps)
    return -jax.lax.stop_gradient(advantages) * logps


def nash_md_token_kl(logps, ref_logps, win_rates, mask, *, beta=0.1):
    """Nash-MD as TRL computes it: each token pays for its own log-ratio, and not for those that it leads to.

        A_t = win_rate - 1/2 - beta (logps_t - ref_logps_t),   without gradient
        loss_t = -A_t logps_t

    ``nash_md`` is the equation of Munos et al. 2023, https://arxiv.org/abs/2312.00886, in which every token pays for
    the log-ratio of the whole answer. A token decides what comes after it, so this gradient is that of another KL:
    the sum of those of the next token along the policy's own answers, as if these did not depend on it.

    Args:
      logps: [B, T] under the policy, in nats, of answers that it sampled.
      ref_logps: [B, T] under the reference.
      win_rates: [B] in [0, 1], the probability that the answer is preferred to the opponent's.
      mask: [B, T] bool, the scored tokens.
      beta: >= 0.

    Returns:
      [B, T] float32; 0 where not scored. TRL takes the sum over a row and the mean over rows:
      ``weights.constant_length`` with a length of 1.

    Raises:
      ValueError: the shapes disagree, or beta is below 0.

    >>> x = jnp.array([[-2.0, -1.0]])
    >>> print(nash_md_token_kl(x, x, jnp.array([0.75]), jnp.ones((1, 2), bool)))
    [[0.5  0.25]]
    """
    logps, ref_logps = weights.scored(mask, logps=logps, ref_logps=ref_logps)
    checks.shapes(logps=(logps, "B T"), win_rates=(win_rates, "B"))
    (win_rates,) = checks.floats(win_rates=win_rates)
    checks.between("beta", beta, 0.0, float("inf"))
    gain = win_rates[:, None] - 0.5 - beta * weights.log_ratio(logps, ref_logps)
    return -jax.lax.stop_gradient(gain) * logps


def optimal_value(rewards, *, beta=0.5):
    """What the best policy within reach of the reference would earn on a prompt, from samples of the reference.

        V = beta log mean_g exp(r_g / beta)

    Brantley et al. 2025 (A*-PO), https://arxiv.org/abs/2505.20686. For a small beta the best reward of the group, for a
    large one the mean.

    Args:
      rewards: [P, G], of answers that the reference sampled; NaN for an answer without verdict.
      beta: > 0, the paper's beta_1.

    Returns:
      [P] float32; 0 for a prompt without any verdict.

    Raises:
      ValueError: rewards is not of two axes, or beta is not above 0.

    >>> r = jnp.log(jnp.array([[1.0, 2.0, 3.0, jnp.nan]]))
    >>> print(jnp.exp(optimal_value(r, beta=1.0)).round(4))
    [2.]
    """
    checks.shapes(rewards=(rewards, "P G"))
    (rewards,) = checks.floats(rewards=rewards)
    checks.positive("beta", beta)
    judged = ~jnp.isnan(rewards)
    count = judged.sum(-1)
    # where nothing is judged, a sum over all of the row's zeros: its logarithm is finite, and so is the gradient
    over = judged | (count == 0)[:, None]
    total = jax.nn.logsumexp(jnp.where(judged, rewards, 0) / beta, -1, where=over)
    return jnp.where(count > 0, beta * (total - jnp.log(jnp.maximum(count, 1).astype(rewards.dtype))), 0)


def a2po(logps, ref_logps, optimal_advantages, *, beta=1e-3):
    """A*-PO: the implicit reward of an answer is regressed onto its advantage under the best policy.

        loss = (beta (logps - ref_logps) - optimal_advantage)^2

    Brantley et al. 2025, https://arxiv.org/abs/2505.20686. One answer a prompt is enough, because the value has been
    estimated beforehand.

    Args:
      logps: [B] summed log-probability under the policy, in nats, of an answer that it sampled.
      ref_logps: [B] the same under the reference.
      optimal_advantages: [B] the answer's reward minus ``optimal_value`` of its prompt.
      beta: > 0, the paper's beta_2.

    Returns:
      [B] float32.

    Raises:
      ValueError: the shapes disagree, or beta is not above 0.

    >>> print(a2po(jnp.array([-2.0]), jnp.array([-3.0]), jnp.array([0.5]), beta=1.0))
    [0.25]
    """
    logps, ref_logps, optimal_advantages = checks.rows(
        logps=logps, ref_logps=ref_logps, optimal_advantages=optimal_advantages
    )
    return jnp.square(implicit_reward(logps, ref_logps, beta=beta) - optimal_advantages)
