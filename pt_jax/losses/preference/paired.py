"""Losses on pairs of answers of which one is preferred."""

import jax

from pt_jax import checks


def implicit_reward(logps, ref_logps, *, beta=0.1):
    """The reward that a policy stands for under DPO: beta (log p(y|x) - log p_ref(y|x)), up to a term of the prompt.

    Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 5.

    Args:
      logps: [B] summed log-probability of an answer under the policy, in nats.
      ref_logps: [B] the same under the reference.
      beta: > 0.

    Returns:
      [B] float32.

    >>> import jax.numpy as jnp
    >>> print(implicit_reward(jnp.array([-1.0]), jnp.array([-3.0]), beta=0.5))
    [1.]
    """
    logps, ref_logps = checks.rows(logps=logps, ref_logps=ref_logps)
    checks.positive("beta", beta)
    return beta * (logps - ref_logps)


def dpo(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1, label_smoothing=0.0):
    """Direct preference optimisation, one value a pair.

        h = beta ((chosen - ref_chosen) - (rejected - ref_rejected))
        loss = -(1 - s) log sigmoid(h) - s log sigmoid(-h)

    Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7; s is the label smoothing of Mitchell's
    conservative DPO (https://ericmitchell.ai/cdpo.pdf, equation 3), 0 in the paper.

    Args:
      chosen: [B] summed log-probability of the preferred answer under the policy, in nats.
      rejected: [B] the same of the other answer.
      ref_chosen: [B] of the preferred answer under the frozen reference.
      ref_rejected: [B] of the other answer under the frozen reference.
      beta: > 0; larger keeps the policy nearer the reference.
      label_smoothing: in [0, 0.5), the share of pairs believed to be labelled the wrong way round.

    Returns:
      [B] float32, in nats; log 2 when the policy equals the reference.

    Raises:
      ValueError: the shapes disagree, or a number is out of range.

    An answer of probability 0.5 that the reference gives 0.1, against one of 0.1 that the reference gives 0.2, costs
    -log sigmoid(log 5 + log 2) = log 1.1:

    >>> import jax.numpy as jnp
    >>> chosen, ref_chosen, rejected, ref_rejected = jnp.log(jnp.array([[0.5], [0.1], [0.1], [0.2]]))
    >>> print(dpo(chosen, rejected, ref_chosen, ref_rejected, beta=1.0).round(4))
    [0.0953]
    """
    chosen, rejected, ref_chosen, ref_rejected = checks.rows(
        chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    checks.between("label_smoothing", label_smoothing, 0.0, 0.5)
    h = implicit_reward(chosen, ref_chosen, beta=beta) - implicit_reward(rejected, ref_rejected, beta=beta)
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(h) - label_smoothing * jax.nn.log_sigmoid(-h)
