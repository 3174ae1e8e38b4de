"""Losses of models that give an answer, or each step of it, a number."""

import jax
import jax.numpy as jnp

from pt_jax import checks, weights


def bradley_terry(chosen_rewards, rejected_rewards):
    """How surprising the preference is to a reward model, one value a pair: -log p(chosen beats rejected).

        loss = -log sigmoid(r_chosen - r_rejected)

    Bradley and Terry 1952; of language models: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, equation 1.

    Args:
      chosen_rewards: [B] what the model gives the preferred answer.
      rejected_rewards: [B] and the other one.

    Returns:
      [B] float32, in nats.

    Raises:
      ValueError: the shapes disagree.

    >>> print(bradley_terry(jnp.log(jnp.array([3.0])), jnp.zeros(1)).round(4))  # log 4/3
    [0.2877]
    """
    chosen_rewards, rejected_rewards = checks.rows(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    return -jax.nn.log_sigmoid(chosen_rewards - rejected_rewards)


def bradley_terry_margin(chosen_rewards, rejected_rewards, margins):
    """Bradley-Terry where a clearer preference asks for a larger difference.

        loss = -log sigmoid(r_chosen - r_rejected - m)

    Touvron et al. 2023 (Llama 2), https://arxiv.org/abs/2307.09288, equation 2.

    Args:
      chosen_rewards: [B] what the model gives the preferred answer.
      rejected_rewards: [B] and the other one.
      margins: [B] m, 0 for "negligibly better" and larger the clearer; no gradient flows into it.

    Returns:
      [B] float32, in nats.

    Raises:
      ValueError: the shapes disagree.

    >>> print(bradley_terry_margin(jnp.full(1, 5.0), jnp.full(1, 2.0), jnp.full(1, 3.0)).round(4))  # log 2
    [0.6931]
    """
    margins, rejected_rewards = checks.rows(margins=margins, rejected_rewards=rejected_rewards)
    return bradley_terry(chosen_rewards, rejected_rewards + jax.lax.stop_gradient(margins))


def centring(chosen_rewards, rejected_rewards, *, coefficient=0.01):
    """Keeps the rewards of a pair around 0, to be added to a loss that sees only their difference.

        loss = coefficient (r_chosen + r_rejected)^2

    Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244. Without it a reward is known up to a number that differs
    from prompt to prompt, and neither a threshold nor a mean over several models means anything.

    Args:
      chosen_rewards: [B] what the model gives the preferred answer.
      rejected_rewards: [B] and the other one.
      coefficient: >= 0.

    Returns:
      [B] float32.

    Raises:
      ValueError: the shapes disagree, or coefficient is below 0.

    >>> print(centring(jnp.array([3.0, 3.0]), jnp.array([1.0, -3.0])))
    [0.16 0. ]
    """
    chosen_rewards, rejected_rewards = checks.rows(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    checks.between("coefficient", coefficient, 0.0, float("inf"))
    return coefficient * jnp.square(chosen_rewards + rejected_rewards)


def reward_accuracy(chosen_rewards, rejected_rewards):
    """Whether the preferred answer gets more; a tie is a miss, because it decides nothing.

        accuracy = [r_chosen > r_rejected]

    Metric of Ouyang et al. 2022, https://arxiv.org/abs/2203.02155.

    Args:
      chosen_rewards: [B] what the model gives the preferred answer.
      rejected_rewards: [B] and the other one.

    Returns:
      [B] float32, 0 or 1.

    >>> print(reward_accuracy(jnp.array([2.0, 1.0, 1.0]), jnp.array([1.0, 1.0, 2.0])))
    [1. 0. 0.]
    """
    chosen_rewards, rejected_rewards = checks.rows(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    return (chosen_rewards > rejected_rewards).astype(chosen_rewards.dtype)


def process_reward(step_logits, step_labels, mask):
    """Cross-entropy of a process reward model: is the solution right so far, asked at the last token of every step.

        loss = -y log sigmoid(z) - (1 - y) log sigmoid(-z)

    Lightman et al. 2023, https://arxiv.org/abs/2305.20050; with estimated labels Wang et al. 2023 (Math-Shepherd),
    https://arxiv.org/abs/2312.08935. A model with two outputs has z = z_right - z_wrong.

    Args:
      step_logits: [B, T] z, of the model when it has read the token; log-odds of "right so far".
      step_labels: [B, T] y, bool, or in [0, 1] the share of continuations from here that came out right; no
        gradient flows into it.
      mask: [B, T] bool, the last tokens of steps that have a label.

    Returns:
      [B, T] float32, in nats; 0 where not scored.

    Raises:
      ValueError: the shapes disagree, or step_logits is not of a float type.

    >>> z, y = jnp.log(jnp.array([[3.0, 1.0, 3.0]])), jnp.array([[True, True, False]])
    >>> print(process_reward(z, y, jnp.array([[True, False, True]])).round(4))  # log 4/3, not scored, log 4
    [[0.2877 0. 1.3863]]
    """
    checks.shapes(step_logits=(step_logits, "B T"), step_labels=(step_labels, "B T"))
    (z,) = weights.scored(mask, step_logits=step_logits)
    y = jax.lax.stop_gradient(jnp.where(mask, step_labels, 0).astype(z.dtype))
    return jnp.where(mask, -y * jax.nn.log_sigmoid(z) - (1 - y) * jax.nn.log_sigmoid(-z), 0)
