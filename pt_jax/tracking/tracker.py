"""Where a training loop reports: one call a step, to the terminal, to the file, and to whoever else wants to know."""

import contextlib

from pt_jax.tracking.metrics import check


class Tracker:
    """Passes what a loop reports on to a ``Progress`` and to logs; there may be none of either.

    A log that fails is told once and left out from then on: a full disk or a dead network ends no training.

    Args:
      progress: what shows the stages, entered by the caller.
      log: where the metrics are written, closed by the caller: anything with ``log(step, stage, **metrics)``.
      *more: such logs (``sinks``).
    """

    def __init__(self, progress=None, log=None, *more):
        self.progress, self.logs = progress, [x for x in (log, *more) if x is not None]
        self.warnings: list[str] = []

    @contextlib.contextmanager
    def stage(self, name: str, total: int, done: int = 0):
        """The stage ``name`` of ``total`` steps runs while the block does; gives the ``TrackedStage``.

        Args:
          name: of the stage.
          total: its steps.
          done: those that an earlier process did.
        """
        shown = self.progress.stage(name, total, done) if self.progress else contextlib.nullcontext()
        with shown as bar:
            yield TrackedStage(name, bar, self)

    def write(self, step: int, stage: str, metrics: dict) -> None:
        """Hands a line to every log that still works."""
        for log in [*self.logs]:
            try:
                log.log(step, stage, **metrics)
            except Exception as e:
                self.logs.remove(log)
                self.warn(f"{_name(log)} failed at step {step} and gets no more metrics: {type(e).__name__}: {e}")

    def warn(self, sentence: str) -> None:
        """Prints a warning above the live lines, and keeps it in ``warnings`` for a report at the end."""
        self.warnings.append(sentence)
        if self.progress:
            self.print(warning(sentence), soft_wrap=True)

    def print(self, *objects, **options) -> None:
        """Prints above the live lines; without a progress, nowhere."""
        if self.progress:
            self.progress.print(*objects, **options)


def warning(sentence: str):
    """A sentence as what ``rich`` prints of a warning; brackets in it are text."""
    from rich.text import Text

    return Text.assemble(("Warning:", "yellow"), " ", sentence)


def _name(log) -> str:
    return str(getattr(log, "path", None) or getattr(log, "name", None) or type(log).__name__)


class TrackedStage:
    """One stage of a ``Tracker``."""

    def __init__(self, name, bar, tracker):
        self.name, self._bar, self._tracker = name, bar, tracker
        self.latest: dict = {}  # the metrics of the last step that had any

    def step(self, step: int, metrics=None) -> None:
        """``step`` steps are done.

        Args:
          step: steps done so far, from 1; the same number again for what is measured between two steps.
          metrics: name to plain number, fetched from the device; None when none were fetched: nothing is written.

        Raises:
          ValueError: a metric is not a number, or is named "step" or "stage".
        """
        metrics = metrics or {}
        if taken := {"step", "stage"} & metrics.keys():
            raise ValueError(f"metrics has {sorted(taken)}, which every line has already; rename them")
        for name, value in metrics.items():
            check(name, value)
        self.latest = dict(metrics) or self.latest
        if metrics:
            self._tracker.write(step, self.name, metrics)
        if self._bar:
            self._bar.reach(step, **metrics)
