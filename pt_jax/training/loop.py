"""The loop: steps in order, metrics fetched once an interval."""

import math

import jax


def fit(state, train_step, batch_of_step, *, steps: int, on_metrics, log_every: int = 10, frozen=None):
    """Trains from the state's step to ``steps``.

    The batch of a step is a function of the step's number, so a state is all that is needed to go on. Metrics stay on
    the device until an interval is full: fetching them earlier would make the device wait for the host.

    Args:
      state: a ``TrainState``; it is consumed.
      train_step: of ``make_train_step``.
      batch_of_step: step number -> batch, on the device or not.
      steps: the number of the last step.
      on_metrics: called with the step's number (from 1) and its scalar metrics as floats, for every step in order.
      log_every: length of the interval in steps.
      frozen: passed to the loss.

    Returns:
      The state after the last step.

    Raises:
      FloatingPointError: a loss or a gradient is not finite; the parameters are not to be used.
    """
    waiting = []
    for i in range(int(state.step), steps):
        state, metrics = train_step(state, frozen, batch_of_step(i))
        waiting.append((i + 1, {k: v for k, v in metrics.items() if v.ndim == 0}))
        if (i + 1) % log_every == 0 or i + 1 == steps:
            for number, values in jax.device_get(waiting):
                report(number, values, on_metrics)
            waiting.clear()
    return state


def report(step, metrics, on_metrics) -> None:
    """Hands a step's fetched metrics on as floats; fails when the loss or the gradient's norm is not finite."""
    values = {name: float(value) for name, value in metrics.items()}
    on_metrics(step, values)
    for name, what in (("loss", "the loss"), ("grad_norm", "the gradient's norm")):
        if not math.isfinite(values.get(name, 0.0)):
            raise FloatingPointError(f"{what} of step {step} is {values[name]}; a lower learning rate usually helps")
