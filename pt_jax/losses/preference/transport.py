"""AOT: the policy's preferences must beat the reference's as a distribution, not pair by pair.

Melnyk et al. 2024, https://arxiv.org/abs/2406.05882. A distribution dominates another when each of its quantiles is
larger. The quantiles of a batch are its sorted values, and sorting is what pairs them up (one-dimensional optimal
transport): these are losses **of the whole batch**. Microbatches have other quantiles than the batch that they are
parts of, so the gradient depends on how it is split; and rows that only fill a batch would be quantiles as well, so
leave them out.
"""

import jax.numpy as jnp

from pt_jax import checks
from pt_jax.losses.preference.paired import dpo, log_ratios


def aot(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1, label_smoothing=0.0):
    """AOT for pairs: the k-th smallest margin of the policy against the k-th smallest margin of the reference.

        d = sort(chosen - rejected) - sort(ref_chosen - ref_rejected)
        loss = -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)

    Melnyk et al. 2024, https://arxiv.org/abs/2406.05882. With one pair it is ``dpo``.

    Args:
      chosen, rejected, ref_chosen, ref_rejected: as in ``dpo``.
      beta: > 0.
      label_smoothing: in [0, 0.5).

    Returns:
      [B] float32, in nats, **one value a quantile of the batch**, from the lowest; not a pair.

    Raises:
      ValueError: the shapes disagree, or a number is out of range.

    The margins 1 and 5 are the reference's, in another order: no quantile moved.

    >>> margin, zero = jnp.array([5.0, 1.0]), jnp.zeros(2)
    >>> print(aot(margin, zero, margin[::-1], zero).round(4))
    [0.6931 0.6931]
    """
    chosen, rejected, ref_chosen, ref_rejected = checks.rows(
        chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    margin, ref_margin = jnp.sort(chosen - rejected), jnp.sort(ref_chosen - ref_rejected)
    zero = jnp.zeros_like(margin)
    return dpo(margin, zero, ref_margin, zero, beta=beta, label_smoothing=label_smoothing)


def aot_unpaired(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1, label_smoothing=0.0):
    """AOT for answers that need not belong together: the k-th smallest reward of the good against that of the bad.

        d = sort(chosen - ref_chosen) - sort(rejected - ref_rejected)
        loss = -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)

    Melnyk et al. 2024, https://arxiv.org/abs/2406.05882. Arguments and result as ``aot``; ``chosen[i]`` and
    ``rejected[i]`` may answer different prompts.

    >>> good, bad, zero = jnp.array([4.0, 2.0]), jnp.array([2.0, 4.0]), jnp.zeros(2)
    >>> print(aot_unpaired(good, bad, zero, zero).round(4))
    [0.6931 0.6931]
    """
    c, r = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    c, r = jnp.sort(c), jnp.sort(r)
    zero = jnp.zeros_like(c)
    return dpo(c, r, zero, zero, beta=beta, label_smoothing=label_smoothing)
