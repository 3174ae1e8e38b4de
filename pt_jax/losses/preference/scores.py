"""What a log-ratio is worth under the divergence that holds the policy near its reference (f-DPO).

DPO follows from maximising a reward under a penalty of beta KL(policy || reference). With another f-divergence in the
place of the KL, the reward that a policy stands for is beta f'(p / p_ref), and that f' is all that changes in the loss
(Wang et al. 2023, https://arxiv.org/abs/2309.16240). With u = log p(y|x) - log p_ref(y|x):

    ====================  ==================  ============================================================
    function              score s(u)          what it does to an answer that lost most of its probability
    ====================  ==================  ============================================================
    ``reverse_kl``        u                   goes on pushing it down, at a constant rate: DPO
    ``jensen_shannon``    log(2 sigmoid(u))   the same, but an answer gained is worth log 2 at most
    ``alpha_divergence``  (1 - e^(-a u)) / a  between the two KLs
    ``forward_kl``        1 - e^(-u)          each further nat lost costs e times the one before
    ====================  ==================  ============================================================

All have s(0) = 0, and s'(0) = 1 but for ``jensen_shannon``, where it is 1/2: a policy that is still the reference feels
no difference between them, if beta is doubled there. They are passed to the losses on pairs as
``score=scores.forward_kl``, or as ``score=functools.partial(scores.alpha_divergence, alpha=0.3)``.
"""

import jax
import jax.numpy as jnp

from pt_jax import checks


def _expm1(x):
    """exp(x) - 1, continued by a tangent from before the exponential overflows: from 70 on in float32.

    Sums of log-ratios over long answers do get there, and inf - inf of two scores would be NaN. A plain cap would do
    for the value, but would take the gradient away exactly where it is largest.
    """
    limit = jnp.floor(jnp.log(jnp.finfo(x.dtype).max)) - 18
    return jnp.expm1(jnp.minimum(x, limit)) + jnp.exp(limit) * jax.nn.relu(x - limit)


def reverse_kl(log_ratio):
    """The score of KL(policy || reference), which is DPO's: s(u) = u.

    Rafailov et al. 2023, https://arxiv.org/abs/2305.18290.

    Args:
      log_ratio: [B] log p(y|x) - log p_ref(y|x), in nats.

    Returns:
      [B] float32.

    >>> print(reverse_kl(jnp.array([0.0, -2.0])))
    [ 0. -2.]
    """
    return checks.rows(log_ratio=log_ratio)[0]


def forward_kl(log_ratio):
    """The score of KL(reference || policy): s(u) = 1 - exp(-u). Arguments as ``reverse_kl``.

    The constant 1, which cancels in every difference of two scores, makes it 0 for a policy that is the reference.

    >>> print(forward_kl(jnp.log(jnp.array([1.0, 0.5, 2.0]))).round(4))  # 1 - p_ref / p
    [ 0.  -1.   0.5]
    """
    (log_ratio,) = checks.rows(log_ratio=log_ratio)
    return 0 - _expm1(-log_ratio)


def jensen_shannon(log_ratio):
    """The score of the Jensen-Shannon divergence: s(u) = log 2 + log sigmoid(u). Arguments as ``reverse_kl``.

    >>> print(jnp.exp(jensen_shannon(jnp.log(jnp.array([1.0, 3.0])))).round(4))  # 2 r / (1 + r)
    [1.  1.5]
    """
    (log_ratio,) = checks.rows(log_ratio=log_ratio)
    return jnp.log(2.0) + jax.nn.log_sigmoid(log_ratio)


def alpha_divergence(log_ratio, *, alpha=0.5):
    """The score of the alpha-divergence: s(u) = (1 - exp(-alpha u)) / alpha, and u where alpha is 0.

    So alpha = 0 is the reverse KL and alpha = 1 the forward KL. **TRL counts the other way round**: its
    ``f_alpha_divergence_coef`` is 1 - alpha, and is 1 for the reverse KL.

    Args:
      log_ratio: [B] log p(y|x) - log p_ref(y|x), in nats.
      alpha: in (0, 1) in the paper; any finite number is an f-divergence.

    Returns:
      [B] float32.

    >>> print(alpha_divergence(jnp.log(jnp.array([1.0, 0.25, 4.0])), alpha=0.5).round(4))  # 2 (1 - 1 / sqrt(r))
    [ 0. -2.  1.]
    """
    (log_ratio,) = checks.rows(log_ratio=log_ratio)
    checks.between("alpha", alpha, -float("inf"), float("inf"))
    alpha = jnp.asarray(alpha, log_ratio.dtype)
    a = jnp.where(alpha == 0, 1, alpha)
    return jnp.where(alpha == 0, log_ratio, (0 - _expm1(-a * log_ratio)) / a)
