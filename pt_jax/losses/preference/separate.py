"""Losses on pairs that hold each answer against the reference by itself, and not only against the other.

A loss of the margin alone is content when both answers get rarer, as long as the rejected one does so faster. These
are not: each says where the chosen and where the rejected answer is to go. With c = beta (chosen - ref_chosen), and r
alike:

    =============  ==============================================  ================================================
    function       loss                                            drives
    =============  ==============================================  ================================================
    ``nca``        -ls(c) - ls(-c) / 2 - ls(-r) / 2                c up to log 2, r down; ls is log sigmoid
    ``bco_pair``   -ls(c) - ls(-r)                                 c up, r down
    ``sppo``       (log-ratio - (win rate - 1/2) / beta)^2         each to where its win rate says
    ``apo_zero``   sigmoid(-c) + sigmoid(r)                        c up, r down, each less the farther it got
    ``apo_down``   sigmoid(c) + sigmoid(r - c)                     both down, r more
    =============  ==============================================  ================================================
"""

import jax
import jax.numpy as jnp

from pt_jax import checks
from pt_jax.losses.preference.paired import log_ratios


def _rewards(chosen, rejected, ref_chosen, ref_rejected, beta):
    """beta c and beta r, after the checks."""
    c, r = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    checks.positive("beta", beta)
    return beta * c, beta * r


def nca(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1):
    """Noise-contrastive alignment on a pair: tell the policy's answers from the reference's.

        loss = -log sigmoid(c) - log sigmoid(-c) / 2 - log sigmoid(-r) / 2
        c = beta (chosen - ref_chosen),   r = beta (rejected - ref_rejected)

    Chen et al. 2024, https://arxiv.org/abs/2402.05369, for two answers of which one is good. The middle term pulls the
    chosen answer back: its best place is c = log 2, where ``dpo`` would go on.

    Args:
      chosen, rejected, ref_chosen, ref_rejected: as in ``dpo``.
      beta: > 0.

    Returns:
      [B] float32, in nats; 2 log 2 when the policy equals the reference.

    Raises:
      ValueError: the shapes disagree, or beta is not above 0.

    >>> zero = jnp.zeros(1)
    >>> print(nca(zero, zero, zero, zero).round(4))
    [1.3863]
    """
    c, r = _rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
    return -jax.nn.log_sigmoid(c) - 0.5 * jax.nn.log_sigmoid(-c) - 0.5 * jax.nn.log_sigmoid(-r)


def bco_pair(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1):
    """Binary classifier optimisation on a pair, its rewards not shifted: tell good from bad.

        loss = -log sigmoid(c) - log sigmoid(-r)
        c = beta (chosen - ref_chosen),   r = beta (rejected - ref_rejected)

    Jung et al. 2024, https://arxiv.org/abs/2404.04656, where the rewards are taken from their running mean first; TRL's
    ``bco_pair`` leaves that out, and so does this function. It is never below ``dpo``, which is the paper's argument.

    Args:
      chosen, rejected, ref_chosen, ref_rejected: as in ``dpo``.
      beta: > 0.

    Returns:
      [B] float32, in nats; 2 log 2 when the policy equals the reference.

    Raises:
      ValueError: the shapes disagree, or beta is not above 0.

    >>> zero, h = jnp.zeros(1), jnp.log(jnp.array([3.0]))  # 3/4 for the good one, 1/4 for the bad
    >>> print(jnp.exp(-bco_pair(h, -h, zero, zero, beta=1.0)).round(4))  # 3/4 * 3/4
    [0.5625]
    """
    c, r = _rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
    return -jax.nn.log_sigmoid(c) - jax.nn.log_sigmoid(-r)


def sppo(logps, ref_logps, win_rates, *, beta=1e-3):
    """Self-play preference optimisation: a log-ratio is regressed onto how often its answer wins, one value an answer.

        loss = (logps - ref_logps - (win_rate - 1/2) / beta)^2

    Wu et al. 2024, https://arxiv.org/abs/2405.00675, equation 4.7, where 1 / beta is called eta, 1000 in the
    experiments. The reference is the policy that sampled the answers, of the iteration before.

    Args:
      logps: [B] summed log-probability of an answer under the policy, in nats.
      ref_logps: [B] the same under the reference.
      win_rates: [B] in [0, 1], the probability that the answer is preferred to another one of the reference.
      beta: > 0.

    Returns:
      [B] float32, in nats^2.

    Raises:
      ValueError: the shapes disagree, or beta is not above 0.

    >>> print(sppo(jnp.array([2.0]), jnp.zeros(1), jnp.array([0.75]), beta=0.125))
    [0.]
    """
    logps, ref_logps, win_rates = checks.rows(logps=logps, ref_logps=ref_logps, win_rates=win_rates)
    checks.positive("beta", beta)
    return jnp.square(logps - ref_logps - (win_rates - 0.5) / beta)


def sppo_hard(chosen, rejected, ref_chosen, ref_rejected, *, beta=1e-3):
    """SPPO on a pair with hard win rates: ``sppo`` with 1 for the chosen answer plus ``sppo`` with 0 for the rejected.

        loss = (chosen - ref_chosen - 1 / (2 beta))^2 + (rejected - ref_rejected + 1 / (2 beta))^2

    Wu et al. 2024, https://arxiv.org/abs/2405.00675, equation 4.7.

    Args:
      chosen, rejected, ref_chosen, ref_rejected: as in ``dpo``.
      beta: > 0, the paper's 1 / eta.

    Returns:
      [B] float32, in nats^2; 1 / (2 beta^2) when the policy equals the reference.

    Raises:
      ValueError: the shapes disagree, or beta is not above 0.

    >>> zero = jnp.zeros(2)
    >>> print(sppo_hard(jnp.array([0.0, 5.0]), jnp.array([0.0, -4.0]), zero, zero, beta=0.1))
    [50. 1.]
    """
    c, r = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    zero = jnp.zeros_like(c)
    return sppo(c, zero, zero + 1, beta=beta) + sppo(r, zero, zero, beta=beta)


def apo_zero(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1):
    """Anchored preference optimisation for chosen answers better than the policy's own: up with one, down with one.

        loss = sigmoid(-c) + sigmoid(r)
        c = beta (chosen - ref_chosen),   r = beta (rejected - ref_rejected)

    D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266, equation 7, plus 1 (as in TRL), so that the least is 0:
    sigmoid(-c) = 1 - sigmoid(c).

    Args:
      chosen, rejected, ref_chosen, ref_rejected: as in ``dpo``.
      beta: > 0.

    Returns:
      [B] float32 in (0, 2); 1 when the policy equals the reference.

    Raises:
      ValueError: the shapes disagree, or beta is not above 0.

    >>> zero, h = jnp.zeros(1), jnp.log(jnp.array([3.0]))
    >>> print(apo_zero(h, -h, zero, zero, beta=1.0))  # 1/4 + 1/4
    [0.5]
    """
    c, r = _rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
    return jax.nn.sigmoid(-c) + jax.nn.sigmoid(r)


def apo_down(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1):
    """Anchored preference optimisation for chosen answers worse than the policy's own: down with both, one more.

        loss = sigmoid(c) + sigmoid(r - c)
        c = beta (chosen - ref_chosen),   r = beta (rejected - ref_rejected)

    D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266, equation 8, plus 1 (as in TRL), so that the least is 0.

    Args:
      chosen, rejected, ref_chosen, ref_rejected: as in ``dpo``.
      beta: > 0.

    Returns:
      [B] float32 in (0, 2); 1 when the policy equals the reference.

    Raises:
      ValueError: the shapes disagree, or beta is not above 0.

    >>> zero, h = jnp.zeros(1), jnp.log(jnp.array([3.0]))
    >>> print(apo_down(-h, -2 * h, zero, zero, beta=1.0))  # 1/4 + 1/4
    [0.5]
    """
    c, r = _rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
    return jax.nn.sigmoid(c) + jax.nn.sigmoid(r - c)
