"""Preference losses that know how long the answers are.

A sum of log-probabilities grows with the length of an answer, so that a loss of sums listens to long answers more and
teaches a policy to be long. Two ways out: averages in the place of sums (``dpo_norm``, ``ipo_norm``; both take the sums
and divide), and sums in which what one answer says beyond the length of the other counts for less (``ld_sum``,
which takes the place of ``logps.sequence_logps`` before any loss).
"""

import jax
import jax.numpy as jnp

from pt_jax import checks, weights
from pt_jax.losses.preference import scores
from pt_jax.losses.preference.paired import log_ratios


def _margin_a_token(chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length, score):
    """s(c) / |chosen| - s(r) / |rejected|; an answer without tokens counts as one of 1."""
    c, r = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    checks.shapes(chosen=(chosen, "B"), chosen_length=(chosen_length, "B"), rejected_length=(rejected_length, "B"))
    chosen_length, rejected_length = (jnp.maximum(jnp.asarray(n, c.dtype), 1) for n in (chosen_length, rejected_length))
    return score(c) / chosen_length - score(r) / rejected_length


def dpo_norm(chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length, *, beta=5.0,
             score=scores.reverse_kl):  # fmt: skip
    """DPO on averages over tokens, so that a long answer does not count for more.

        h = beta (s(chosen - ref_chosen) / chosen_length - s(rejected - ref_rejected) / rejected_length)
        loss = -log sigmoid(h)

    Lambert et al. 2024 (Tulu 3), https://arxiv.org/abs/2411.15124, equation 6: the length-normalised DPO. An average is
    smaller than a sum by the length, so beta is of another size than in ``dpo``.

    Args:
      chosen, rejected, ref_chosen, ref_rejected: [B] **sums**, as in ``dpo``: the division happens here.
      chosen_length: [B] scored tokens of the preferred answer.
      rejected_length: [B] of the other one.
      beta: > 0; 5 in the paper.
      score: as in ``dpo``, of the sum.

    Returns:
      [B] float32, in nats; log 2 when the policy equals the reference.

    Raises:
      ValueError: the shapes disagree, or beta is not above 0.

    >>> zero, two = jnp.zeros(1), jnp.full(1, 2.0)
    >>> h = jnp.log(jnp.array([9.0]))  # half of it a token: sigmoid(log 3) = 3/4
    >>> print(jnp.exp(-dpo_norm(h, zero, zero, zero, two, two, beta=1.0)).round(4))
    [0.75]
    """
    h = _margin_a_token(chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length, score)
    checks.positive("beta", beta)
    return -jax.nn.log_sigmoid(beta * h)


def ipo_norm(chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length, *, beta=0.1,
             score=scores.reverse_kl):  # fmt: skip
    """IPO on averages over tokens, as TRL computes it; ``ipo`` is the equation of the paper.

        loss = (s(chosen - ref_chosen) / chosen_length - s(rejected - ref_rejected) / rejected_length - 1 / (2 beta))^2

    Azar et al. 2023, https://arxiv.org/abs/2310.12036, equation 17; that the paper's experiments took averages is told
    in TRL's documentation. Repeating every token of an answer changes nothing here, and doubles the margin of ``ipo``.

    Args:
      chosen, rejected, ref_chosen, ref_rejected: [B] **sums**, as in ``dpo``: the division happens here.
      chosen_length: [B] scored tokens of the preferred answer.
      rejected_length: [B] of the other one.
      beta: > 0.
      score: as in ``dpo``, of the sum.

    Returns:
      [B] float32; 1 / (4 beta^2) when the policy equals the reference.

    Raises:
      ValueError: the shapes disagree, or beta is not above 0.

    >>> zero, two = jnp.zeros(1), jnp.full(1, 2.0)
    >>> print(ipo_norm(jnp.array([4.0]), zero, zero, zero, two, two, beta=0.1))  # (4 / 2 - 5)^2
    [9.]
    """
    checks.positive("beta", beta)
    h = _margin_a_token(chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length, score)
    return jnp.square(h - 0.5 / beta)


def ld_sum(logps, mask, other_length, *, alpha=0.5):
    """A row's sum of log-probabilities in which the tokens beyond the length of the other answer weigh less: LD-DPO.

        sum_t logps (t-th scored token <= other_length),   plus alpha times the rest

    Liu et al. 2024, https://arxiv.org/abs/2409.06411. Take it for both answers and both models, each row with the
    number of scored tokens of the answer that it is compared with; then any loss on pairs.

    Args:
      logps: [B, T] in nats.
      mask: [B, T] bool, the scored tokens; they are counted where they are, over gaps and padding.
      other_length: [B] scored tokens of the other answer of the pair.
      alpha: in [0, 1]; 1 is the plain sum, 0 forgets the tail.

    Returns:
      [B] float32, in nats; 0 for a row without scored tokens.

    Raises:
      ValueError: the shapes disagree, or alpha is out of range.

    >>> print(ld_sum(jnp.array([[-9.0, -1.0, -2.0, -4.0]]), jnp.arange(4)[None] > 0, jnp.array([2]), alpha=0.25))
    [-4.]
    """
    checks.shapes(logps=(logps, "B T"), other_length=(other_length, "B"))
    (logps,) = weights.scored(mask, logps=logps)
    checks.share("alpha", alpha)
    shared = jnp.cumsum(mask, -1) <= jnp.asarray(other_length)[:, None]
    return jnp.where(shared, logps, alpha * logps).sum(-1)
