"""The loop: steps in order, metrics fetched once an interval, and between two steps whatever else a run wants.

A step is any function ``(state, frozen, batch) -> (state, metrics)``: that of ``make_train_step``, or one of
reinforcement learning that samples from ``state.params`` and then updates.
"""

import math
import time
from typing import NamedTuple

import jax

from pt_jax import checks
from pt_jax.signals import Stopped


def fit(
    state, train_step, batch_of_step, *, steps: int, on_metrics, log_every: int = 10, frozen=None, start=None,
    callbacks=(), save=None, stop=None, bad_steps: int = 3,
):  # fmt: skip
    """Trains from the state's step to ``steps``.

    The batch of a step is a function of the step's number, so a state is all that is needed to go on. Metrics stay on
    the device until an interval is full, and are fetched once the next step has been handed over: fetching them earlier
    would make the device wait for the host.

    Args:
      state: a ``TrainState``; it is consumed.
      train_step: of ``make_train_step``, or any function of the same arguments and results.
      batch_of_step: step number (from 0) -> batch, on the device or not; or an iterator of batches, which only the
        caller can put where a run is to go on.
      steps: the number of the last step.
      on_metrics: called with the step's number (from 1) and its scalar metrics as floats, for every step in order.
      log_every: length of the interval in steps.
      frozen: passed to the loss.
      start: how many steps are done; ``state.step`` when None.
      callbacks: called in order after every step with its number (from 1), the state and its metrics, which are on the
        device. What is returned (a dict, or None) joins the metrics; ``EndOfTraining`` ends the loop after the step.
      save: of ``every``, or any object with ``due(step)``, asked after every step, and ``__call__(step, state,
        values)``, called when it is or when ``stop`` has a reason, with the step's metrics as floats. All metrics up to
        the step have been reported by then.
      stop: step number -> reason to stop after it, such as a signal's name, or None (``signals.asked``,
        ``time_limit``).
      bad_steps: after so many steps in a row that the step has skipped (metric ``skipped``), training is given up.
        Those before ``start`` are ``state.bad``: a step of several updates is to count itself there as one.

    Returns:
      The state after the last step.

    Raises:
      FloatingPointError: the loss or the gradient was not finite ``bad_steps`` times in a row, or once in a step that
        does not skip. Its ``step`` (from 0) and ``state`` are those to look into.
      Stopped: ``stop`` gave a reason; ``state`` is the state, which has been saved.
      ValueError: an iterator has no batch for a step.
    """
    checks.positive("log_every", log_every)
    checks.positive("bad_steps", bad_steps)
    start, stop = int(state.step) if start is None else start, stop or (lambda step: None)
    batch_of = batch_of_step if callable(batch_of_step) else _in_order(iter(batch_of_step), start, steps)
    interval = _Interval(on_metrics, bad_steps, int(getattr(state, "bad", 0)))
    if start < steps and (reason := stop(start)):  # nothing is there that was not before
        raise _with(Stopped(reason), step=start, state=state)
    for step in range(start + 1, steps + 1):
        state, metrics = train_step(state, frozen, batch_of(step - 1))
        ended = False
        for callback in callbacks:
            try:
                metrics = metrics | (callback(step, state, metrics) or {})
            except EndOfTraining as e:
                metrics, ended = metrics | e.metrics, True
        interval.report_full(state)
        interval.add(step, metrics)
        reason = stop(step) if step < steps and not ended else None  # what is done need not be stopped
        due = save is not None and save.due(step)
        if due or reason or ended or step == steps or (step % log_every == 0 and interval.close()):
            values = interval.report(state)
        if save is not None and (due or reason):
            save(step, state, values)
        if reason:
            raise _with(Stopped(reason), step=step, state=state)
        if ended:
            break
    return state


def _in_order(batches, start, steps):
    """Step number -> the next batch of an iterator."""
    missing = object()

    def batch_of(step):
        if (batch := next(batches, missing)) is missing:
            raise ValueError(
                f"batch_of_step: ends before step {step + 1}; it had {step - start} batches, and training from step "
                f"{start} to {steps} takes {steps - start}"
            )
        return batch

    return batch_of


class EndOfTraining(Exception):
    """Raised by a callback: this step was the last one. ``metrics`` join those of the step."""

    def __init__(self, **metrics):
        super().__init__("the training has come to its end")
        self.metrics = metrics


class _Interval:
    """Metrics that are still on the device."""

    def __init__(self, on_metrics, bad_steps, row):
        self.on_metrics, self.bad_steps, self.row = on_metrics, bad_steps, row
        self.waiting, self.names, self.full = [], [], False

    def add(self, step, metrics):
        scalars = {name: value for name, value in metrics.items() if getattr(value, "ndim", 0) == 0}
        self.waiting.append((step, [*scalars.values()]))
        self.names.append([*scalars])  # jax would sort them

    def close(self) -> bool:
        """It is full; whether what waits is there already, so that to fetch it keeps nobody waiting."""
        self.full = not all(x.is_ready() for _, values in self.waiting for x in values if isinstance(x, jax.Array))
        return not self.full

    def report_full(self, state):
        """Called once the step after a full interval has been handed over."""
        if self.full:
            self.report(state)

    def report(self, state) -> dict:
        """Fetches and hands on all that wait; gives those of the last step."""
        self.full = False
        fetched, names, self.waiting, self.names = jax.device_get(self.waiting), self.names, [], []
        for (step, values), known in zip(fetched, names):
            metrics = dict(zip(known, values))
            self.row = self.row + 1 if metrics.get("skipped") else 0
            last = report(step, metrics, self.on_metrics, may_skip=self.row < self.bad_steps, state=state)
        return last


def report(step, metrics, on_metrics, *, may_skip=True, state=None) -> dict:
    """Hands a step's fetched metrics on as floats; fails when loss or gradient are not finite and were not skipped."""
    values = {name: float(value) for name, value in metrics.items()}
    on_metrics(step, values)
    if values.get("skipped") and may_skip:
        return values
    for name, what in (("loss", "the loss"), ("grad_norm", "the gradient's norm")):
        if not math.isfinite(values.get(name, 0.0)):
            said = f"{what} of step {step} is {values[name]}; a lower learning rate usually helps"
            raise _with(FloatingPointError(said), step=step - 1, state=state)
    if values.get("skipped"):  # for a reason of ``skip_when``
        said = f"step {step} and those before it were skipped; a lower learning rate usually helps"
        raise _with(FloatingPointError(said), step=step - 1, state=state)
    return values


def _with(error, **notes):
    for name, value in notes.items():
        setattr(error, name, value)
    return error


class every:
    """For ``save``: a function ``(step, state, values)`` of every n-th step.

    Args:
      n: of steps; None saves only when the run is stopped.
      function: what saves.
      poll: called after every step.
    """

    def __init__(self, n: int | None, function, poll=lambda: None):
        self.n, self.function, self.poll = n, function, poll

    def due(self, step: int) -> bool:
        self.poll()
        return self.n is not None and step % self.n == 0

    def __call__(self, step, state, values):
        self.function(step, state, values)


def at(n: int, function):
    """A callback that calls ``function(state) -> dict of metrics`` after every n-th step.

    The function is to be one of the state alone: then a run with it and one without have the same parameters.
    """
    checks.positive("n", n)
    return lambda step, state, metrics: function(state) if step % n == 0 else None


def out_of_patience(values, patience: int, better=min) -> bool:
    """Whether the best of a history is more than ``patience`` values back.

    Args:
      values: one metric, oldest first; NaN is never the best.
      patience: how many values in a row may be no better than the best before them.
      better: min or max.

    >>> out_of_patience([3.0, 2.0, 2.5, 2.1], patience=2), out_of_patience([3.0, 2.0, 2.5, 1.9], patience=2)
    (True, False)
    """
    finite = [v for v in values if not math.isnan(v)]
    return bool(values) and len(values) - 1 - (values.index(better(finite)) if finite else -1) >= patience


def time_limit(seconds: float, clock=time.monotonic, spent: float = 0.0):
    """For ``stop``: a reason once so much time has passed since this call, at which some of it may be spent already.

    The clock of the wall may jump.
    """
    checks.positive("seconds", seconds)
    end = clock() + seconds - spent
    return lambda step: f"the time limit of {seconds:g} seconds" if clock() >= end else None


def first_of(*stops):
    """For ``stop``: the first reason that any of these has."""
    return lambda step: next((reason for s in stops if (reason := s(step))), None)


class Compiled(NamedTuple):
    """What compiling a step took, and what it takes on each device, in bytes.

    Args:
      seconds: to compile.
      arguments: state, frozen and batch.
      temporary: beside them, at the most.
      limit: of the device's memory; None where it does not say.
    """

    seconds: float
    arguments: int
    temporary: int
    limit: int | None

    def __str__(self):
        mib = lambda n: f"{n / 2**20:,.0f} MiB"
        room = "" if self.limit is None else f" of {mib(self.limit)}"
        return (
            f"compiled in {self.seconds:.1f} s; a device holds {mib(self.arguments)} and at most "
            f"{mib(self.temporary)} more in a step{room}"
        )


def compiled(train_step, *arguments) -> Compiled:
    """Compiles a step ahead, so that its first call does not, and says what it will take.

    Args:
      train_step: of ``make_train_step``.
      *arguments: as it will be called with: state, frozen, batch. Nothing is run or consumed.
    """
    begun = time.perf_counter()
    program = train_step.lower(*arguments).compile()
    seconds, memory = time.perf_counter() - begun, program.memory_analysis()
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return Compiled(seconds, memory.argument_size_in_bytes, memory.temp_size_in_bytes, limit)


class Profile:
    """A callback that records steps ``first`` to ``last`` for TensorBoard and Perfetto; close it after the loop.

    Args:
      folder: for the trace; TensorBoard opens it, ui.perfetto.dev the file perfetto_trace.json.gz in it.
      first: at least 2: before the first step there is nothing to begin after, and it compiles.
      last: at least ``first``.
    """

    def __init__(self, folder, first: int, last: int):
        if not 2 <= first <= last:
            raise ValueError(f"a profile of steps {first} to {last}: needs 2 <= first <= last")
        self.folder, self.first, self.last, self.on = folder, first, last, False

    def __call__(self, step, state, metrics):
        if not self.on and self.first - 1 <= step < self.last:
            jax.block_until_ready((state, metrics))  # what came before is not in it
            jax.profiler.start_trace(str(self.folder), create_perfetto_trace=True)
            self.on = True
        elif self.on and step >= self.last:
            jax.block_until_ready((state, metrics))
            self.close()

    def close(self):
        if self.on:
            jax.profiler.stop_trace()
            self.on = False
