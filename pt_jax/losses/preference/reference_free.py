"""Losses on pairs of answers that need no reference model: CPO, SimPO, AlphaPO, ORPO and TPO.

With nothing to stay near to, each is meant to be added to the likelihood of an answer that is good for sure
(``likelihood.nll`` under a weight function; SimPO and AlphaPO are published without):

    ==================  ========================================  ===============================
    loss of a pair      what it compares                          plus the likelihood of
    ==================  ========================================  ===============================
    ``cpo``             log p(y)                                  the chosen answer
    ``simpo``           log p(y) / |y|, with a margin             nothing
    ``alphapo``         (1 - p(y)^(-alpha / |y|)) / alpha         nothing
    ``orpo``            log odds of the mean token                the chosen answer
    ``tpo``             log p(y)                                  a third, gold answer
    ``tpo_l``           log p(y) / |y|, with a margin             a third, gold answer
    ==================  ========================================  ===============================
"""

import jax
import jax.numpy as jnp

from pt_jax import checks
from pt_jax.losses.preference import paired


def _per_token(chosen, rejected, chosen_length, rejected_length):
    """Mean log-probability of a token of each answer; an answer without tokens counts as one of 1."""
    chosen, rejected = checks.rows(chosen=chosen, rejected=rejected)
    checks.shapes(chosen=(chosen, "B"), chosen_length=(chosen_length, "B"), rejected_length=(rejected_length, "B"))
    lengths = (jnp.maximum(jnp.asarray(n, chosen.dtype), 1) for n in (chosen_length, rejected_length))
    return tuple(x / n for x, n in zip((chosen, rejected), lengths))


def _no_reference(chosen, rejected):
    """The four arguments of a loss with a reference, for one that likes all answers alike."""
    chosen, rejected = checks.rows(chosen=chosen, rejected=rejected)
    return chosen, rejected, jnp.zeros_like(chosen), jnp.zeros_like(rejected)


def cpo(chosen, rejected, *, beta=0.1, label_smoothing=0.0):
    """The preference term of contrastive preference optimisation: DPO with a reference that likes all answers alike.

        h = beta (chosen - rejected)
        loss = -(1 - s) log sigmoid(h) - s log sigmoid(-h)

    Xu et al. 2024, https://arxiv.org/abs/2401.08417, section 3; the whole of CPO adds ``likelihood.nll`` of the
    chosen answer. s is the label smoothing of ``dpo``, 0 in the paper.

    Args:
      chosen: [B] summed log-probability of the preferred answer, in nats.
      rejected: [B] the same of the other answer.
      beta: > 0.
      label_smoothing: in [0, 0.5), the share of pairs believed to be labelled the wrong way round.

    Returns:
      [B] float32, in nats; log 2 for two answers of one probability.

    Raises:
      ValueError: the shapes disagree, or a number is out of range.

    Twice as likely at beta = 1 costs -log sigmoid(log 2) = -log(2 / 3):

    >>> print(cpo(jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25])), beta=1.0).round(4))
    [0.4055]
    """
    return paired.dpo(*_no_reference(chosen, rejected), beta=beta, label_smoothing=label_smoothing)


def cpo_hinge(chosen, rejected, *, beta=0.1):
    """CPO with a hinge loss, which is 0 from a margin of 1 / beta on.

        loss = max(0, 1 - h),   h = beta (chosen - rejected)

    TRL's ``loss_type="hinge"``. That of Zhao et al. 2023 (SLiC), https://arxiv.org/abs/2305.10425, is ``slic``: this
    over beta, with delta = 1 / beta.

    Args:
      chosen: [B] summed log-probability of the preferred answer, in nats.
      rejected: [B] the same of the other answer.
      beta: > 0, the inverse of the margin.

    Returns:
      [B] float32.

    Raises:
      ValueError: the shapes disagree, or beta is not above 0.

    >>> print(cpo_hinge(jnp.array([-1.0, -1.0, -3.0]), jnp.array([-9.0, -2.0, -1.0]), beta=0.5))
    [0.  0.5 2. ]
    """
    return paired.hinge(*_no_reference(chosen, rejected), beta=beta)


def cpo_ipo(chosen, rejected, chosen_length, rejected_length, *, beta=0.1):
    """CPO with the squared loss of IPO, on the mean token: the margin shall be 1 / (2 beta), neither less nor more.

        loss = (chosen / |chosen| - rejected / |rejected| - 1 / (2 beta))^2

    TRL's ``loss_type="ipo"``: Azar et al. 2023 (IPO), https://arxiv.org/abs/2310.12036, equation 17, without the
    reference and with means where theirs has sums; beta is their tau.

    Args:
      chosen: [B] summed log-probability of the preferred answer, in nats.
      rejected: [B] the same of the other answer.
      chosen_length: [B] scored tokens of the preferred answer, ``mask.sum(-1)``.
      rejected_length: [B] of the other answer.
      beta: > 0.

    Returns:
      [B] float32.

    Raises:
      ValueError: the shapes disagree, or beta is not above 0.

    >>> two = jnp.array([2.0])
    >>> print(cpo_ipo(jnp.array([-2.0]), jnp.array([-6.0]), two, two, beta=0.25))  # margin -1 + 3, wanted 2
    [0.]
    """
    means = _per_token(chosen, rejected, chosen_length, rejected_length)
    return paired.ipo(*_no_reference(*means), beta=beta)


def simpo(chosen, rejected, chosen_length, rejected_length, *, beta=2.0, gamma=0.5, label_smoothing=0.0):
    """Simple preference optimisation: the mean token of the chosen answer shall be likelier, by a margin.

        h = beta (chosen / |chosen| - rejected / |rejected|) - gamma
        loss = -(1 - s) log sigmoid(h) - s log sigmoid(-h)

    Meng et al. 2024, https://arxiv.org/abs/2405.14734, equation 6; s is 0 in the paper. The margin is often given as
    the ratio gamma / beta, in nats a token.

    Args:
      chosen: [B] summed log-probability of the preferred answer, in nats.
      rejected: [B] the same of the other answer.
      chosen_length: [B] scored tokens of the preferred answer, ``mask.sum(-1)``.
      rejected_length: [B] of the other answer.
      beta: > 0.
      gamma: >= 0, the margin times beta.
      label_smoothing: in [0, 0.5), as in ``cpo``.

    Returns:
      [B] float32, in nats.

    Raises:
      ValueError: the shapes disagree, or a number is out of range.

    Twice as long at the same probability a token is no better; only the margin is missing, -log sigmoid(-log 3):

    >>> one, two = jnp.array([1.0]), jnp.array([2.0])
    >>> print(simpo(jnp.array([-3.0]), jnp.array([-6.0]), one, two, gamma=jnp.log(3.0)).round(4))  # log 4
    [1.3863]
    """
    chosen, rejected = _per_token(chosen, rejected, chosen_length, rejected_length)
    checks.positive("beta", beta)
    checks.between("gamma", gamma, 0.0, float("inf"))
    return cpo(chosen, rejected + gamma / beta, beta=beta, label_smoothing=label_smoothing)


def _relative_growth(u):
    """(exp(u) - 1) / u, 1 at 0, with derivatives of every order that training needs.

    Near 0 the derivative of the quotient is a difference of numbers of size 1 / u, so a series stands there; at
    |u| < 0.01 its next term is below the rounding of float64.
    """
    near = jnp.abs(u) < 1e-2
    series = jnp.polyval(jnp.array([1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0], u.dtype), u)
    return jnp.where(near, series, jnp.expm1(u) / jnp.where(near, 1, u))


def alpha_reward(logps, *, alpha=0.25):
    """The reward of AlphaPO: a power of the probability, whose limit at alpha = 0 is its logarithm.

        r = (1 - p^(-alpha)) / alpha = (1 - exp(-alpha logps)) / alpha,   r -> logps for alpha -> 0

    Gupta et al. 2025, https://arxiv.org/abs/2501.03884. With alpha > 0 a small probability is worse than its
    logarithm says, with alpha < 0 better. Coded as logps (exp(u) - 1) / u with u = -alpha logps, which is exact at
    alpha = 0 as well, where the difference of the equation would be 0 / 0.

    Args:
      logps: [B] log-probability of an answer, in AlphaPO of its mean token, in nats.
      alpha: any number; exp(-alpha logps) must be finite, which it is for the mean token (and may not be for a sum).

    Returns:
      [B] float32; 0 for certainty, and like ``logps`` near it.

    Raises:
      ValueError: logps is not [B], or alpha is no number.

    >>> print(alpha_reward(jnp.log(jnp.array([1.0, 0.25])), alpha=0.5))  # (1 - 2) / 0.5
    [ 0. -2.]
    """
    (logps,) = checks.rows(logps=logps)
    checks.between("alpha", alpha, -float("inf"), float("inf"))
    return logps * _relative_growth(-alpha * logps)


def alphapo(chosen, rejected, chosen_length, rejected_length, *, beta=2.5, gamma=0.1, alpha=0.25, label_smoothing=0.0):
    """SimPO with another shape of the reward; at alpha = 0 it is SimPO.

        r(y) = (1 - p(y)^(-alpha / |y|)) / alpha
        h = beta (r(chosen) - r(rejected)) - gamma
        loss = -(1 - s) log sigmoid(h) - s log sigmoid(-h)

    Gupta et al. 2025, https://arxiv.org/abs/2501.03884; the defaults are theirs for Mistral Instruct; s is 0
    in the paper.

    Args:
      chosen: [B] summed log-probability of the preferred answer, in nats.
      rejected: [B] the same of the other answer.
      chosen_length: [B] scored tokens of the preferred answer, ``mask.sum(-1)``.
      rejected_length: [B] of the other answer.
      beta: > 0.
      gamma: >= 0, the margin times beta.
      alpha: any number, see ``alpha_reward``.
      label_smoothing: in [0, 0.5), as in ``cpo``.

    Returns:
      [B] float32, in nats.

    Raises:
      ValueError: the shapes disagree, or a number is out of range.

    Rewards of 0 and -2 (see ``alpha_reward``) at beta = 1 and no margin cost -log sigmoid(2):

    >>> one, p = jnp.ones(1), jnp.log(jnp.array([[1.0], [0.25]]))
    >>> print(alphapo(*p, one, one, beta=1.0, gamma=0.0, alpha=0.5).round(4))
    [0.1269]
    """
    chosen, rejected = _per_token(chosen, rejected, chosen_length, rejected_length)
    rewards = [alpha_reward(x, alpha=alpha) for x in (chosen, rejected)]
    one = jnp.ones_like(chosen)
    return simpo(*rewards, one, one, beta=beta, gamma=gamma, label_smoothing=label_smoothing)


def log_odds(logps):
    """Logarithm of how many times likelier something is than not: log(p / (1 - p)) = logps - log(1 - exp(logps)).

    Hong et al. 2024 (ORPO), https://arxiv.org/abs/2403.07691, equation 4. A certain event has infinite odds, and a
    short answer that the model knows by heart is certain in float32; so p is taken to be at most the largest number
    below 1 (the log odds at most 16.6 in float32), with the slope that it has there.

    Args:
      logps: [B] log-probability, in ORPO of the mean token, in nats.

    Returns:
      [B] float32.

    Raises:
      ValueError: logps is not [B].

    >>> print(log_odds(jnp.log(jnp.array([0.5, 0.75]))).round(4))  # log 1, log 3
    [0. 1.0986]
    """
    (logps,) = checks.rows(logps=logps)
    largest = -jnp.finfo(logps.dtype).epsneg
    # the value is capped and the derivative is not: 0 would leave an answer that shall become less likely where it is
    beyond = jnp.where(logps < largest, 0, logps)
    logps = jnp.where(logps < largest, logps, largest) + (beyond - jax.lax.stop_gradient(beyond))
    return logps - jnp.log(-jnp.expm1(logps))


def orpo(chosen, rejected, chosen_length, rejected_length):
    """The odds-ratio term of ORPO, on the mean token.

        loss = -log sigmoid(log odds(chosen / |chosen|) - log odds(rejected / |rejected|))

    Hong et al. 2024, https://arxiv.org/abs/2403.07691, equation 7. The whole of ORPO (equation 6) is ``likelihood.nll``
    of the chosen answer plus lambda times this; lambda is 0.1 for their Mistral.

    Args:
      chosen: [B] summed log-probability of the preferred answer, in nats.
      rejected: [B] the same of the other answer.
      chosen_length: [B] scored tokens of the preferred answer, ``mask.sum(-1)``.
      rejected_length: [B] of the other answer.

    Returns:
      [B] float32, in nats; log 2 for two answers of equal odds.

    Raises:
      ValueError: the shapes disagree.

    Odds of 3 against odds of 1 cost -log(3 / (3 + 1)):

    >>> one, p = jnp.ones(1), jnp.log(jnp.array([[0.75], [0.5]]))
    >>> print(orpo(*p, one, one).round(4))
    [0.2877]
    """
    chosen, rejected = _per_token(chosen, rejected, chosen_length, rejected_length)
    return -jax.nn.log_sigmoid(log_odds(chosen) - log_odds(rejected))


def tpo(chosen, rejected, *, beta=0.01, label_smoothing=0.0):
    """The preference term of triple preference optimisation, which is that of CPO.

        loss = -log sigmoid(h),   h = beta (chosen - rejected)

    Saeidi et al. 2024, https://arxiv.org/abs/2405.16681. The whole of TPO adds ``likelihood.nll`` of a third answer,
    the gold one, and has no likelihood of the chosen answer. Arguments as ``cpo``.

    >>> print(tpo(jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25])), beta=1.0).round(4))  # log 3 / 2
    [0.4055]
    """
    return cpo(chosen, rejected, beta=beta, label_smoothing=label_smoothing)


def tpo_l(chosen, rejected, chosen_length, rejected_length, *, beta=0.01, gamma=0.5, label_smoothing=0.0):
    """The preference term of the length-controlled TPO-L, which is that of SimPO.

        loss = -log sigmoid(h),   h = beta (chosen / |chosen| - rejected / |rejected|) - gamma

    Saeidi et al. 2024, https://arxiv.org/abs/2405.16681; the likelihood of the gold answer is added as for ``tpo``.
    Arguments as ``simpo``; the defaults are those of the authors for Llama 3 and 5000 triples.

    >>> one, two = jnp.array([1.0]), jnp.array([2.0])
    >>> print(tpo_l(jnp.array([-3.0]), jnp.array([-6.0]), one, two, gamma=jnp.log(3.0)).round(4))  # log 4
    [1.3863]
    """
    return simpo(
        chosen, rejected, chosen_length, rejected_length, beta=beta, gamma=gamma, label_smoothing=label_smoothing
    )
