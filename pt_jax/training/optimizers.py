"""The usual optimiser, as an optax transformation; any other one does as well."""

import jax
import optax

from pt_jax import checks


def adamw(
    learning_rate: float,
    steps: int,
    *,
    warmup: float = 0.0,
    final: float = 0.0,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    b2: float = 0.999,
):
    """AdamW with warm-up, a linear decay of the rate, and the gradient clipped by its global norm.

    Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101. Norms and biases are not decayed: leaves
    whose name ends in "norm" or "bias", or is flax's "scale".

    Args:
      learning_rate: the highest.
      steps: of the whole run.
      warmup: in [0, 1), the share of the steps over which the rate rises from 0.
      final: in [0, 1], the share of the highest rate that is left at the end; 1 is a constant rate.
      weight_decay: decoupled, times the rate.
      clip: largest global norm of the gradient, > 0.
      b2: of the second moment.

    Raises:
      ValueError: a number is out of range.
    """
    checks.positive("learning_rate", learning_rate)
    checks.positive("clip", clip)
    checks.positive("steps", steps)
    checks.between("warmup", warmup, 0.0, 1.0)
    if not 0 <= final <= 1:
        raise ValueError(f"final must be from 0 to 1, got {final}")
    checks.between("weight_decay", weight_decay, 0.0, float("inf"))
    checks.between("b2", b2, 0.0, 1.0)
    rise = round(warmup * steps)
    rate = optax.join_schedules(
        [
            optax.linear_schedule(learning_rate / (rise + 1), learning_rate, rise),
            optax.linear_schedule(learning_rate, final * learning_rate, max(steps - rise, 1)),
        ],
        [rise],
    )
    decayed = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: not _is_norm(path), params)
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(rate, b2=b2, weight_decay=weight_decay, mask=decayed),
    )


def _is_norm(path) -> bool:
    name = jax.tree_util.keystr(path[-1:], simple=True)
    return name.endswith(("norm", "bias")) or name == "scale"
