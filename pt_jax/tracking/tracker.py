"""Where a training loop reports: one call a step, to the terminal and to the file."""

import contextlib


class Tracker:
    """Passes what a loop reports on to a ``Progress`` and a ``JsonlLog``; either may be None.

    Args:
      progress: what shows the stages, entered by the caller.
      log: where the metrics are written, closed by the caller.
    """

    def __init__(self, progress=None, log=None):
        self.progress, self.log = progress, log
        self.warnings: list[str] = []

    @contextlib.contextmanager
    def stage(self, name: str, total: int):
        """The stage ``name`` of ``total`` steps runs while the block does; gives the ``TrackedStage``."""
        shown = self.progress.stage(name, total) if self.progress else contextlib.nullcontext()
        with shown as bar:
            yield TrackedStage(name, bar, self.log)

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


class TrackedStage:
    """One stage of a ``Tracker``."""

    def __init__(self, name, bar, log):
        self.name, self._bar, self._log = name, bar, log
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
        self.latest = dict(metrics) or self.latest
        if self._log and metrics:
            self._log.log(step, self.name, **metrics)
        if self._bar:
            self._bar.reach(step, **metrics)
