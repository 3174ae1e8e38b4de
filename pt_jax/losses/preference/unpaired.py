"""Losses on single answers, each judged desirable or not: KTO, APO's unpaired form and BCO.

Such a loss needs a point that divides gains from losses. KTO takes the policy's divergence from the reference,
estimated on answers to other prompts (``mismatched_kl``); BCO takes an average of the rewards, which a record carries
from step to step (``MovingMidpoint`` as published, ``RunningMean`` as in TRL); APO takes 0. Both numbers are those of
the whole batch: compute them once, before it is split into microbatches, and pass them to every part.
"""

import jax
import jax.numpy as jnp
from flax import struct

from pt_jax import checks, weights
from pt_jax.losses.preference.paired import implicit_reward


def _verdicts(desirable):
    """Labels of -1 and 1 would all count as desirable, so only bool will do."""
    if jnp.asarray(desirable).dtype != bool:
        raise ValueError(f"desirable must be of type bool, got {jnp.asarray(desirable).dtype}")
    return desirable


def _constant(**number):
    """A scalar into which no gradient flows."""
    checks.shapes(**{name: (x, "") for name, x in number.items()})
    (value,) = number.values()
    value = jnp.asarray(value, jnp.result_type(value, jnp.float32) if isinstance(value, jax.Array) else jnp.float32)
    return jax.lax.stop_gradient(value)


def mismatched_kl(logps, ref_logps, row_weights):
    """KTO's reference point: how far the policy is from the reference, on answers that belong to other prompts.

        kl = max(0, sum_i w_i (logps_i - ref_logps_i))

    Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, section 4. Row i is prompt i with the answer of another
    row, for example ``jnp.roll(answers, 1, 0)``: an answer that the prompt did not ask for is a stand-in for a
    sample of the policy, which would have to be generated. It is biased, and cheap. No gradient flows into it.

    Args:
      logps: [B] summed log-probability of the mismatched answers under the policy, in nats.
      ref_logps: [B] the same under the reference.
      row_weights: [B], from ``weights.row_mean``; a row of weight 0 only fills the batch.

    Returns:
      The kl, a scalar of at least 0, in nats; and the log-ratios [B] that it is the mean of, whose spread says how
      far to trust it.

    Raises:
      ValueError: the shapes disagree.

    >>> mean = jnp.array([0.5, 0.5, 0.0])
    >>> kl, log_ratios = mismatched_kl(jnp.array([-1.0, -2.0, 9.0]), jnp.array([-4.0, -1.0, 0.0]), mean)
    >>> print(kl, log_ratios)
    1.0 [ 3. -1.  9.]
    """
    row_weights, *_ = checks.rows(row_weights=row_weights, logps=logps, ref_logps=ref_logps)
    log_ratios = jax.lax.stop_gradient(implicit_reward(logps, ref_logps, beta=1.0))
    return jnp.maximum(weights.weighted_sum(log_ratios, jax.lax.stop_gradient(row_weights)), 0), log_ratios


def kto(logps, ref_logps, desirable, kl, *, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    """Kahneman-Tversky optimisation, one value an answer: gains and losses both level off, as they do for people.

        r = logps - ref_logps
        loss = desirable_weight (1 - sigmoid(beta (r - kl)))      of a desirable answer
        loss = undesirable_weight (1 - sigmoid(beta (kl - r)))    of another

    Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, section 4. Its advice for unbalanced data is to choose
    the weights such that both kinds count alike: weight times number of answers the same, or a little more of the
    desirable.

    Args:
      logps: [B] summed log-probability of an answer under the policy, in nats.
      ref_logps: [B] the same under the reference.
      desirable: [B] bool.
      kl: the scalar of ``mismatched_kl``; no gradient flows into it.
      beta: > 0.
      desirable_weight: >= 0.
      undesirable_weight: >= 0.

    Returns:
      [B] float32, between 0 and the weight of the answer.

    Raises:
      ValueError: the shapes disagree, desirable is not bool, or a number is out of range.

    Three times likelier than under the reference has sigmoid(log 3) = 3/4:

    >>> r, nothing = jnp.log(jnp.array([3.0, 3.0])), jnp.zeros(2)
    >>> print(kto(r, nothing, jnp.array([True, False]), 0.0, beta=1.0))
    [0.25 0.75]
    """
    checks.shapes(logps=(logps, "B"), desirable=(desirable, "B"))
    checks.between("desirable_weight", desirable_weight, 0.0, float("inf"))
    checks.between("undesirable_weight", undesirable_weight, 0.0, float("inf"))
    desirable, kl = _verdicts(desirable), _constant(kl=kl)
    gain = implicit_reward(logps, ref_logps, beta=beta) - beta * kl
    weight = jnp.where(desirable, desirable_weight, undesirable_weight)
    return weight * jax.nn.sigmoid(jnp.where(desirable, -gain, gain))


def apo_zero_unpaired(logps, ref_logps, desirable, *, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    """APO-zero on single answers: KTO whose reference point is 0.

        loss = desirable_weight (1 - sigmoid(beta r))    of a desirable answer,   r = logps - ref_logps
        loss = undesirable_weight sigmoid(beta r)        of another

    D'Oosterlinck et al. 2024 (APO), https://arxiv.org/abs/2408.06266: desirable answers shall become likelier and
    others less likely than under the reference. Arguments as ``kto``, which see.

    >>> r, nothing = jnp.log(jnp.array([3.0, 3.0])), jnp.zeros(2)
    >>> print(apo_zero_unpaired(r, nothing, jnp.array([True, False]), beta=1.0))
    [0.25 0.75]
    """
    return kto(
        logps, ref_logps, desirable, 0.0,
        beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight,
    )  # fmt: skip


def bco(logps, ref_logps, desirable, shift, *, beta=0.1):
    """Binary classifier optimisation, one value an answer: the reward is the logit of "desirable".

        r = beta (logps - ref_logps)
        loss = -log sigmoid(r - shift)       of a desirable answer
        loss = -log sigmoid(-(r - shift))    of another

    Jung et al. 2024, https://arxiv.org/abs/2404.04656. The shift makes the bound on DPO's loss tight; a record gives
    it, updated with the rewards of this batch first. Multiply by ``density_ratio`` where the desirable and the other
    answers are to different kinds of prompts.

    Args:
      logps: [B] summed log-probability of an answer under the policy, in nats.
      ref_logps: [B] the same under the reference.
      desirable: [B] bool.
      shift: scalar, ``.shift`` of ``MovingMidpoint`` or ``RunningMean``, in units of r; no gradient flows into it.
      beta: > 0.

    Returns:
      [B] float32, in nats.

    Raises:
      ValueError: the shapes disagree, desirable is not bool, or beta is not above 0.

    A logit of log 3 says "desirable" with 3/4:

    >>> r, nothing = jnp.log(jnp.array([3.0, 3.0])), jnp.zeros(2)
    >>> print(bco(r, nothing, jnp.array([True, False]), 0.0, beta=1.0).round(4))  # log 4/3, log 4
    [0.2877 1.3863]
    """
    checks.shapes(logps=(logps, "B"), desirable=(desirable, "B"))
    desirable, shift = _verdicts(desirable), _constant(shift=shift)
    logit = implicit_reward(logps, ref_logps, beta=beta) - shift
    return -jax.nn.log_sigmoid(jnp.where(desirable, logit, -logit))


def density_ratio(desirable_probs, desirable, *, smallest=0.5, largest=10.0):
    """BCO's weight of an answer, so that the undesirable ones count as if their prompts were the desirable ones'.

        w = 1 of a desirable answer,   w = clip(p / (1 - p), smallest, largest) of another

    Jung et al. 2024 (underlying distribution matching), https://arxiv.org/abs/2404.04656; the bounds are TRL's. p is
    what a classifier that sees only the prompt says of its answer being desirable; p / (1 - p) is the ratio of the
    densities of the two kinds of prompts where the classifier was trained on as many of each.

    Args:
      desirable_probs: [B] p, in [0, 1]; no gradient flows into it.
      desirable: [B] bool.
      smallest: > 0, of the weights of undesirable answers.
      largest: > 0, not below ``smallest``.

    Returns:
      [B] float32.

    Raises:
      ValueError: the shapes disagree, desirable is not bool, or a number is out of range.

    >>> print(density_ratio(jnp.array([0.75, 0.75, 0.1, 1.0]), jnp.array([True, False, False, False])))
    [ 1. 3. 0.5 10. ]
    """
    checks.shapes(desirable_probs=(desirable_probs, "B"), desirable=(desirable, "B"))
    (p,) = checks.rows(desirable_probs=desirable_probs)
    checks.positive("smallest", smallest)
    checks.positive("largest", largest)
    p = jax.lax.stop_gradient(p)
    return jnp.where(_verdicts(desirable), 1, jnp.clip(p / (1 - p), smallest, largest))


def _zero():
    return jnp.zeros(())


@struct.dataclass
class MovingMidpoint:
    """BCO's shift as published: half-way between the rewards of the desirable and of the undesirable answers.

        shift = (average of desirable rewards + average of undesirable rewards) / 2
        average <- decay average + (1 - decay) mean of the batch

    Jung et al. 2024, https://arxiv.org/abs/2404.04656. It starts at 0, which is the reward of every answer as long as
    the policy is the reference; a batch without one of the two kinds leaves that average alone. Keep it in the train
    state: a run that resumes without it is another run.

    >>> rewards, desirable, rows = jnp.array([4.0, 1.0, -1.0, 7.0]), jnp.array([1, 0, 0, 0]) == 1, jnp.arange(4) < 3
    >>> print(MovingMidpoint().update(rewards, desirable, rows, decay=0.5).shift)  # (2 + 0) / 2
    1.0
    """

    desirable: jax.Array = struct.field(default_factory=_zero)
    undesirable: jax.Array = struct.field(default_factory=_zero)

    @property
    def shift(self):
        return (self.desirable + self.undesirable) / 2

    def update(self, rewards, desirable, rows, *, decay=0.9):
        """The record after a batch; no gradient flows through it.

        Args:
          rewards: [B] beta (logps - ref_logps), from ``implicit_reward``.
          desirable: [B] bool.
          rows: [B] bool, False for a row that only fills the batch.
          decay: in [0, 1), the share of the old average that stays.
        """
        checks.shapes(rewards=(rewards, "B"), desirable=(desirable, "B"), rows=(rows, "B"))
        checks.between("decay", decay, 0.0, 1.0)
        (rewards,) = checks.floats(rewards=jax.lax.stop_gradient(rewards))

        def moved(average, of):
            mean = weights.weighted_sum(rewards, weights.row_mean(of))
            return jnp.where(of.any(), decay * average + (1 - decay) * mean, average).astype(average.dtype)

        good = _verdicts(desirable) & rows
        return MovingMidpoint(moved(self.desirable, good), moved(self.undesirable, rows & ~good))


@struct.dataclass
class RunningMean:
    """BCO's shift as TRL computes it: the mean of all rewards so far, desirable or not.

        shift <- shift + (sum of the batch's rewards - rows shift) / (rows so far)

    It is the published half-way point when there are as many desirable as undesirable answers, and leans towards the
    more frequent kind otherwise; it never forgets. Jung et al. 2024, https://arxiv.org/abs/2404.04656.

    >>> state = RunningMean().update(jnp.array([4.0, 1.0]), jnp.array([True, True]))
    >>> state = state.update(jnp.array([-2.0, 9.0]), jnp.array([True, False]))
    >>> print(state.shift, state.count)  # (4 + 1 - 2) / 3
    1.0 3
    """

    shift: jax.Array = struct.field(default_factory=_zero)
    count: jax.Array = struct.field(default_factory=lambda: jnp.zeros((), jnp.int32))

    def update(self, rewards, rows):
        """The record after a batch; no gradient flows through it.

        Args:
          rewards: [B] beta (logps - ref_logps), from ``implicit_reward``.
          rows: [B] bool, False for a row that only fills the batch.
        """
        checks.shapes(rewards=(rewards, "B"), rows=(rows, "B"))
        (rewards,) = checks.floats(rewards=jax.lax.stop_gradient(rewards))
        count = self.count + rows.sum(dtype=self.count.dtype)
        surplus = weights.weighted_sum(rewards - self.shift, jnp.asarray(rows, rewards.dtype))
        return RunningMean((self.shift + surplus / jnp.maximum(count, 1)).astype(self.shift.dtype), count)
