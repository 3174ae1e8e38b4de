"""Losses on pairs of answers of which one is preferred: what counts is the margin between the two.

``chosen`` and ``rejected`` are what the policy thinks of the answers, ``ref_chosen`` and ``ref_rejected`` what the
reference does: **sums** of log-probabilities over the tokens of an answer, as ``logps.sequence_logps`` gives them.
With c = chosen - ref_chosen and r = rejected - ref_rejected:

    ============== ============================================= =======================================
    function       loss, h = beta (s(c) - s(r))                  in TRL, as ``loss_type``
    ============== ============================================= =======================================
    ``dpo``        -log sigmoid(h), with smoothed labels cDPO    sigmoid (never smooths)
    ``robust_dpo`` the same without the bias of flipped labels   robust
    ``dpop``       ``dpo``, and the chosen must not get rarer    -
    ``odpo``       ``dpo`` with a margin that each pair brings   -
    ``hinge``      max(0, 1 - h)                                 hinge
    ``slic``       max(0, delta - (chosen - rejected))           -
    ``ipo``        (h / beta - 1 / (2 beta))^2, of sums          ipo of online DPO
    ``exo``        KL(policy's choice || label's choice)         exo_pair
    ``discopop``   the logistic loss blended with exp(-h)        discopop
    ============== ============================================= =======================================

``lengths`` has the same losses of averages, among them what TRL calls ipo, and ``transport`` those of a whole batch.
Those with ``score=`` take an f-divergence of ``scores`` in the place of the reverse KL: s(u) = u unless said otherwise.
"""

import jax
import jax.numpy as jnp

from pt_jax import checks
from pt_jax.losses.preference import scores


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


def log_ratios(chosen, rejected, ref_chosen, ref_rejected):
    """How much likelier each answer of a pair is than under the reference: c = chosen - ref_chosen, and r alike.

    Every loss with a reference is a function of the two (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290).
    Arguments as ``dpo``.

    Returns:
      c and r, each [B] float32, in nats.

    >>> c, r = log_ratios(jnp.array([-1.0]), jnp.array([-4.0]), jnp.array([-3.0]), jnp.array([-4.0]))
    >>> print(c, r)
    [2.] [0.]
    """
    chosen, rejected, ref_chosen, ref_rejected = checks.rows(
        chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    return chosen - ref_chosen, rejected - ref_rejected


def _margin(chosen, rejected, ref_chosen, ref_rejected, beta, score):
    """h = beta s(c) - beta s(r), after the checks."""
    c, r = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    checks.positive("beta", beta)
    return beta * score(c) - beta * score(r)


def dpo(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1, label_smoothing=0.0, score=scores.reverse_kl):
    """Direct preference optimisation, one value a pair.

        h = beta (s(chosen - ref_chosen) - s(rejected - ref_rejected))
        loss = -(1 - e) log sigmoid(h) - e log sigmoid(-h)

    Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7; e is the label smoothing of Mitchell's
    conservative DPO (https://ericmitchell.ai/cdpo.pdf, equation 3), 0 in the paper. TRL 1.16 ignores its
    ``label_smoothing`` for this loss: the default here is what it computes.

    Args:
      chosen: [B] summed log-probability of the preferred answer under the policy, in nats.
      rejected: [B] the same of the other answer.
      ref_chosen: [B] of the preferred answer under the frozen reference.
      ref_rejected: [B] of the other answer under the frozen reference.
      beta: > 0; larger keeps the policy nearer the reference.
      label_smoothing: in [0, 0.5), the share of pairs believed to be labelled the wrong way round.
      score: log-ratios [B] -> scores [B], one of ``scores``: the divergence from the reference.

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
    checks.between("label_smoothing", label_smoothing, 0.0, 0.5)
    h = _margin(chosen, rejected, ref_chosen, ref_rejected, beta, score)
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(h) - label_smoothing * jax.nn.log_sigmoid(-h)


def robust_dpo(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1, label_smoothing=0.1, score=scores.reverse_kl):
    """DPO from labels of which a known share is flipped: what it costs on average is what the true labels would cost.

        loss = (-(1 - e) log sigmoid(h) + e log sigmoid(-h)) / (1 - 2 e),   h as in ``dpo``

    Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409. Where conservative DPO adds the other label's loss, this
    subtracts it: it may be negative, and has no minimum of its own.

    Args:
      chosen, rejected, ref_chosen, ref_rejected: as in ``dpo``.
      beta: > 0.
      label_smoothing: in [0, 0.5), the share of pairs that are labelled the wrong way round; 0 is ``dpo``.
      score: as in ``dpo``.

    Returns:
      [B] float32, in nats; log 2 when the policy equals the reference.

    Raises:
      ValueError: the shapes disagree, or a number is out of range.

    >>> zero, h = jnp.zeros(1), jnp.log(jnp.array([3.0]))  # sigmoid(h) = 3/4; (3 log 4/3 - log 4) / 2
    >>> print(robust_dpo(h, zero, zero, zero, beta=1.0, label_smoothing=0.25).round(4))
    [-0.2616]
    """
    checks.between("label_smoothing", label_smoothing, 0.0, 0.5)
    h = _margin(chosen, rejected, ref_chosen, ref_rejected, beta, score)
    as_labelled, flipped = -jax.nn.log_sigmoid(h), -jax.nn.log_sigmoid(-h)
    return ((1 - label_smoothing) * as_labelled - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def dpop(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.3, penalty=50.0):
    """DPO-positive: DPO that does not pay for a margin with the probability of the chosen answer.

        loss = -log sigmoid(beta (c - r - penalty max(0, -c))),   c = chosen - ref_chosen, r = rejected - ref_rejected

    Pal et al. 2024 (Smaug), https://arxiv.org/abs/2402.13228, equation 3. At c = 0, where training starts, the slope is
    that of ``dpo``.

    Args:
      chosen, rejected, ref_chosen, ref_rejected: as in ``dpo``.
      beta: > 0.
      penalty: >= 0, the paper's lambda: the price of a nat by which the chosen answer got less likely than it was.

    Returns:
      [B] float32, in nats.

    Raises:
      ValueError: the shapes disagree, or a number is out of range.

    Both answers lost a nat, the margin is 0, and the chosen one's loss costs a penalty of 2:

    >>> zero, h = jnp.zeros(1), jnp.full(1, -1.0)
    >>> print(dpop(h, h, zero, zero, beta=1.0, penalty=2.0).round(4))  # log(1 + e^2)
    [2.1269]
    """
    c, r = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    checks.positive("beta", beta)
    checks.between("penalty", penalty, 0.0, float("inf"))
    return -jax.nn.log_sigmoid(beta * (c - r - penalty * jax.nn.relu(-c)))


def odpo(chosen, rejected, ref_chosen, ref_rejected, offsets, *, beta=0.1):
    """DPO with an offset: the margin must not only be positive, but as large as the pair deserves.

        loss = -log sigmoid(beta (c - r) - offset),   c = chosen - ref_chosen, r = rejected - ref_rejected

    Amini et al. 2024, https://arxiv.org/abs/2402.10571. The paper's offsets are alpha log(score of the chosen - score
    of the rejected), from any measure of how good the answers are.

    Args:
      chosen, rejected, ref_chosen, ref_rejected: as in ``dpo``.
      offsets: [B], in the unit of the implicit rewards; 0 is ``dpo``.
      beta: > 0.

    Returns:
      [B] float32, in nats; log 2 where the margin of the implicit rewards equals the offset.

    Raises:
      ValueError: the shapes disagree, or beta is not above 0.

    >>> zero, h = jnp.zeros(1), jnp.full(1, 3.0)
    >>> print(odpo(h, zero, zero, zero, h, beta=1.0).round(4))
    [0.6931]
    """
    h = _margin(chosen, rejected, ref_chosen, ref_rejected, beta, scores.reverse_kl)
    _, offsets = checks.rows(chosen=chosen, offsets=offsets)
    return -jax.nn.log_sigmoid(h - offsets)


def hinge(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1, score=scores.reverse_kl):
    """The support vector machine's loss in DPO's place: nothing is gained by a margin above 1.

        loss = max(0, 1 - h),   h as in ``dpo``

    Liu et al. 2023 (RSO), https://arxiv.org/abs/2309.06657, who put the reference into the hinge of ``slic``.

    Args:
      chosen, rejected, ref_chosen, ref_rejected: as in ``dpo``.
      beta: > 0; 1 / beta is the margin of log-ratios that is enough.
      score: as in ``dpo``.

    Returns:
      [B] float32; 1 when the policy equals the reference.

    Raises:
      ValueError: the shapes disagree, or beta is not above 0.

    >>> zero = jnp.zeros(3)
    >>> print(hinge(jnp.array([0.0, 4.0, 20.0]), zero, zero, zero, beta=0.1))
    [1.  0.6 0. ]
    """
    return jax.nn.relu(1 - _margin(chosen, rejected, ref_chosen, ref_rejected, beta, score))


def slic(chosen, rejected, *, delta=1.0):
    """The calibration loss of SLiC-HF, which knows no reference: the chosen answer must lead by delta nats.

        loss = max(0, delta - chosen + rejected)

    Zhao et al. 2023, https://arxiv.org/abs/2305.10425; the paper adds a multiple of ``likelihood.nll`` on answers of
    supervised fine-tuning, which keeps the policy in its place.

    Args:
      chosen: [B] log-probability of the preferred answer under the policy, in nats.
      rejected: [B] the same of the other answer.
      delta: > 0, in nats.

    Returns:
      [B] float32, in nats.

    Raises:
      ValueError: the shapes disagree, or delta is not above 0.

    >>> print(slic(jnp.array([-1.0, -1.0]), jnp.array([-1.5, -9.0])))
    [0.5 0. ]
    """
    chosen, rejected = checks.rows(chosen=chosen, rejected=rejected)
    checks.positive("delta", delta)
    return jax.nn.relu(delta - chosen + rejected)


def ipo(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1, score=scores.reverse_kl):
    """Identity preference optimisation: the margin of the log-ratios is regressed onto 1 / (2 beta) and stays there.

        loss = (s(chosen - ref_chosen) - s(rejected - ref_rejected) - 1 / (2 beta))^2

    Azar et al. 2023, https://arxiv.org/abs/2310.12036, equation 17, where beta is called tau.

    **The paper's equation has sums over the tokens of an answer, and so has this function. In TRL, ``ipo`` has
    averages**: that is ``lengths.ipo_norm``. They are not one loss at two betas: with sums, the margin sought is
    1 / (2 beta) nats for pairs of short answers and of long ones, with averages it grows with the length.

    Args:
      chosen, rejected, ref_chosen, ref_rejected: [B] **sums**, as in ``dpo``.
      beta: > 0; larger keeps the policy nearer the reference.
      score: as in ``dpo``.

    Returns:
      [B] float32, in nats^2; 1 / (4 beta^2) when the policy equals the reference.

    Raises:
      ValueError: the shapes disagree, or beta is not above 0.

    >>> zero = jnp.zeros(3)
    >>> print(ipo(jnp.array([0.0, 5.0, 7.0]), zero, zero, zero, beta=0.1))
    [25.  0.  4.]
    """
    checks.positive("beta", beta)
    return jnp.square(_margin(chosen, rejected, ref_chosen, ref_rejected, 1.0, score) - 0.5 / beta)


def exo(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1, label_smoothing=1e-3, score=scores.reverse_kl):
    """Efficient exact optimisation on a pair: the reverse KL from the labels' choice, where DPO takes the forward one.

        loss = q (log q - log(1 - e)) + (1 - q) (log(1 - q) - log e),   q = sigmoid(h), h as in ``dpo``

    Ji et al. 2024, https://arxiv.org/abs/2402.00856, equation 16 for two answers: the KL between the policy's choice
    and a label that is right with probability 1 - e. Its minimum, 0, is where q = 1 - e.

    Args:
      chosen, rejected, ref_chosen, ref_rejected: as in ``dpo``.
      beta: > 0.
      label_smoothing: in (0, 0.5); with 0 the KL would be infinite.
      score: as in ``dpo``.

    Returns:
      [B] float32, in nats, >= 0.

    Raises:
      ValueError: the shapes disagree, or a number is out of range.

    >>> zero, h = jnp.zeros(2), jnp.log(jnp.array([3.0, 1.0]))  # q = 3/4, and 1/2: half of log 2/3 + log 2
    >>> print(exo(h, zero, zero, zero, beta=1.0, label_smoothing=0.25).round(4))
    [0.     0.1438]
    """
    checks.positive("label_smoothing", label_smoothing)
    checks.between("label_smoothing", label_smoothing, 0.0, 0.5)
    h = _margin(chosen, rejected, ref_chosen, ref_rejected, beta, score)
    for_chosen = jax.nn.sigmoid(h) * (jax.nn.log_sigmoid(h) - jnp.log1p(-label_smoothing))
    for_rejected = jax.nn.sigmoid(-h) * (jax.nn.log_sigmoid(-h) - jnp.log(label_smoothing))
    return for_chosen + for_rejected


def discopop(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.05, tau=0.05, score=scores.reverse_kl):
    """The loss that a language model found when asked for one: logistic for a wrong order, exponential for a right.

        k = sigmoid(h / tau)
        loss = -(1 - k) log sigmoid(h) + k exp(-h),   h as in ``dpo``

    Lu et al. 2024, https://arxiv.org/abs/2406.08414, equation 5 (the log-ratio modulated loss). k exp(-h) is coded as
    exp(log sigmoid(h / tau) - h), because for a pair that is far in the wrong order it is 0 times infinity. The loss is
    not convex: it rises where one part takes over from the other, within a few tau of h = 0, where training starts.

    Args:
      chosen, rejected, ref_chosen, ref_rejected: as in ``dpo``.
      beta: > 0.
      tau: > 0, the width of the blend.
      score: as in ``dpo``.

    Returns:
      [B] float32; (log 2 + 1) / 2 when the policy equals the reference.

    Raises:
      ValueError: the shapes disagree, or a number is out of range.

    >>> zero, h = jnp.zeros(3), jnp.array([0.0, 40.0, -40.0])  # half of each, e^-2, log(1 + e^2)
    >>> print(discopop(h, zero, zero, zero).round(4))
    [0.8466 0.1353 2.1269]
    """
    checks.positive("tau", tau)
    h = _margin(chosen, rejected, ref_chosen, ref_rejected, beta, score)
    return -jax.nn.sigmoid(-h / tau) * jax.nn.log_sigmoid(h) + jnp.exp(jax.nn.log_sigmoid(h / tau) - h)
