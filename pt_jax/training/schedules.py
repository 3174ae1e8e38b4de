"""Learning rates over a run: optax schedules, step -> rate, that all rise alike and fall in their own way.

The rate rises in equal parts from peak / (n + 1) at the first step to the peak at step n + 1, where n is ``warmup`` of
all steps: no step has a rate of 0. A fall would reach its end at the step after the last. The peak may be traced.
"""

import optax

from pt_jax import checks


def linear(peak, steps: int, *, warmup: float = 0.0, final: float = 0.0):
    """Up, then down in a straight line.

    Args:
      peak: the highest rate, > 0.
      steps: of the whole run.
      warmup: in [0, 1), the share of the steps over which the rate rises.
      final: in [0, 1], the share of the peak that is left at the end.

    Returns:
      An optax schedule.

    Raises:
      ValueError: a number is out of range.

    >>> rate = linear(1.0, 4, final=0.5)
    >>> [float(rate(step)) for step in range(4)]
    [1.0, 0.875, 0.75, 0.625]
    """
    checks.share("final", final)
    rise = _rise(peak, steps, warmup)
    return _after(rise, peak, optax.linear_schedule(peak, final * peak, max(steps - rise, 1)))


def cosine(peak, steps: int, *, warmup: float = 0.0, final: float = 0.0):
    """Up, then down along half a cosine: peak (final + (1 - final) (1 + cos(pi t)) / 2), t from 0 to 1.

    Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983, without restarts. Arguments as ``linear``.

    >>> rate = cosine(1.0, 4)
    >>> [round(float(rate(step)), 3) for step in range(4)]
    [1.0, 0.854, 0.5, 0.146]
    """
    checks.share("final", final)
    rise = _rise(peak, steps, warmup)
    return _after(rise, peak, optax.cosine_decay_schedule(peak, max(steps - rise, 1), final))


def constant(peak, steps: int, *, warmup: float = 0.0):
    """Up, and there it stays. Arguments as ``linear``.

    >>> rate = constant(1.0, 4, warmup=0.5)
    >>> [round(float(rate(step)), 3) for step in range(4)]
    [0.333, 0.667, 1.0, 1.0]
    """
    return _after(_rise(peak, steps, warmup), peak, optax.constant_schedule(peak))


def wsd(peak, steps: int, *, warmup: float = 0.0, decay: float = 0.2, final: float = 0.0):
    """Warm-up, stable, decay: it stays at the peak and falls in a straight line over the last of the steps.

    Hu et al. 2024, https://arxiv.org/abs/2404.06395, section 4; the line: Hägele et al. 2024,
    https://arxiv.org/abs/2405.18392.

    Args:
      peak, steps, warmup, final: as ``linear``.
      decay: in (0, 1], the share of the steps over which the rate falls; of those after the rise, where it is longer.

    >>> rate = wsd(1.0, 6, decay=0.5)
    >>> [round(float(rate(step)), 3) for step in range(6)]
    [1.0, 1.0, 1.0, 1.0, 0.667, 0.333]
    """
    checks.share("final", final)
    checks.positive("decay", decay)
    checks.share("decay", decay)
    rise = _rise(peak, steps, warmup)
    fall = max(min(round(decay * steps), steps - rise), 1)
    down = optax.linear_schedule(peak, final * peak, fall)
    stable = steps - rise - fall
    return _after(rise, peak, optax.join_schedules([optax.constant_schedule(peak), down], [stable]))


def _rise(peak, steps, warmup) -> int:
    checks.positive("learning_rate", peak)
    checks.positive("steps", steps)
    checks.between("warmup", warmup, 0.0, 1.0)
    return round(warmup * steps)


def _after(rise, peak, rest):
    return optax.join_schedules([optax.linear_schedule(peak / (rise + 1), peak, rise), rest], [rise])
