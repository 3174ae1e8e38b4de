"""Progress on the terminal: a live line a stage, time left of each and of all; plain lines where there is none."""

import contextlib
import math
import time
from collections.abc import Mapping

from pt_jax.tracking import lines

# Which metrics are shown when there are more than fit: these first, in this order.
SHOW = ("loss", "reward", "rewards/margins", "rewards/accuracies", "eval_reward", "accuracy", "kl", "entropy")
_MARKS = 4096
_BURST = 0.05  # seconds; steps that are reported sooner after each other were done before, and fetched together


class Stage:
    """One stage: how far it is, how fast it goes, what it measured last. Made by ``Progress.stage``."""

    def __init__(self, name, total, clock, changed, done=0):
        self.name, self.total, self.done, self.metrics, self._start = name, total, done, {}, done
        self.begun, self.ended, self.finished = clock(), None, False
        self._clock, self._changed = clock, changed
        self._marks = []  # (steps done, when)

    def advance(self, n: int = 1, /, **metrics: float) -> None:
        """``n`` more steps are done. Metrics are plain numbers; those not given keep their last value."""
        self.reach(self.done + n, **metrics)

    def reach(self, done: int, /, **metrics: float) -> None:
        """``done`` steps are done in all; the same number again only brings new metrics."""
        now = self._clock()
        self.metrics = self.metrics | {name: float(value) for name, value in metrics.items()}
        if done > self.done:
            self._mark(done, now)
        self.done = done
        self._changed(self, now)

    def _mark(self, done, now):
        """Always by a new list, because another thread may be drawing by the old."""
        marks = self._marks
        if marks and now - marks[-1][1] < _BURST:
            marks = [*marks[:-1], (done, marks[-1][1])]
        else:
            marks = [*(marks[1::2] if len(marks) >= _MARKS else marks), (done, now)]
        if len(marks) == 1 and done > self._start + 1:  # the first report is of several steps, so it has a rate
            marks = [(self._start, self.begun), *marks]
        self._marks = marks

    def elapsed(self, now: float) -> float:
        return (now if self.ended is None else self.ended) - self.begun

    def rate(self) -> float | None:
        """Steps a second over the later half of the stage; None while there is nothing but a first step.

        The later half forgets the compilations of the first steps, and still averages over evaluations.
        """
        marks = self._marks
        if not marks:
            return None
        (done0, t0), (done1, t1) = marks[(len(marks) - 1) // 2], marks[-1]
        return (done1 - done0) / (t1 - t0) if t1 > t0 else None

    def left(self, now: float) -> float | None:
        """Seconds until the last step; it counts down between reports, and waits when one is overdue."""
        rate, remaining = self.rate(), max(self.total - self.done, 0)
        if rate is None:
            return None
        (done0, _), (done1, last) = self._marks[-2:]
        chunk = min(done1 - done0, remaining)
        return (remaining - chunk) / rate + max(chunk / rate - (now - last), 0)


class Progress:
    """A context manager that shows every stage, and the time left of the stage and of the whole run.

    On a terminal a live line a stage, and one for all of them; elsewhere a plain line at the start and the end of
    a stage and every ``interval`` seconds between. Leaving the block, interrupted too, restores the terminal.

    Args:
      stages: name to guessed duration, in the order they run. Once steps have been timed only the proportions
        count; until then the guesses are taken as seconds, and a time left that rests on them is marked ``~``.
      console: a ``rich.console.Console``; None makes one on standard output. A quiet one shows nothing.
      clock: seconds, growing.
      interval: seconds between two plain lines.
      show: the metrics to show first; at most four are shown, the others in the order they came.

    Raises:
      ValueError: no stages, or a duration that is negative or not finite.
    """

    def __init__(self, stages: Mapping[str, float], *, console=None, clock=time.monotonic, interval=10.0, show=SHOW):
        if not stages:
            raise ValueError("stages is empty; give at least one, as {name: guessed seconds}")
        for name, weight in stages.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"stages[{name!r}] must be a duration of at least 0, got {weight}")
        self.stages, self.show, self.interval = dict(stages), show, interval
        self.begun, self.run, self.current = None, {}, None
        self._console, self._clock, self._live, self._printed = console, clock, None, 0.0

    def __enter__(self):
        from rich.console import Console
        from rich.live import Live

        self._console = self._console or Console()
        self.begun = self._clock()
        if self._console.is_interactive and not self._console.quiet:
            self._live = Live(get_renderable=lambda: lines.Display(self, self._clock()), console=self._console)
            self._live.start()
        return self

    def __exit__(self, *error):
        if self._live:
            self._live.stop()
            self._live = None

    @contextlib.contextmanager
    def stage(self, name: str, total: int, done: int = 0):
        """The stage ``name`` runs while the block does.

        Args:
          name: one of ``stages``; each runs once. Those left out before it count as skipped.
          total: how many steps it has.
          done: how many of them were done by an earlier process.

        Returns:
          A context manager giving the ``Stage``.

        Raises:
          ValueError: the name is unknown or ran before, another stage runs, or Progress was not entered.
        """
        if self.begun is None:
            raise ValueError("stage() before the display is there; write `with Progress(...) as p:` around it")
        if name not in self.stages:
            raise ValueError(f"stage {name!r} is not one of {list(self.stages)}; give it to Progress(stages=...)")
        if self.current is not None or name in self.run:
            why = "has run before" if name in self.run else f"cannot start while {self.current.name!r} runs"
            raise ValueError(f"stage {name!r} {why}; every stage runs once, one after the other")
        if total < 0:
            raise ValueError(f"total must be at least 0, got {total}")
        stage = Stage(name, total, self._clock, self._report, done)
        self.run, self.current = {**self.run, name: stage}, stage  # a new dict: another thread is drawing the old
        self._line(stage, stage.begun)
        try:
            yield stage
            stage.finished = True
        finally:
            stage.ended, self.current = self._clock(), None
            self._line(stage, stage.ended)

    def print(self, *objects, **options) -> None:
        """Prints what ``rich`` can print above the live lines; ``options`` as of ``Console.print``."""
        if self.begun is None:
            raise ValueError("print() before the display is there; write `with Progress(...) as p:` around it")
        self._console.print(*objects, **options)

    def left(self, now: float) -> tuple[float, float, bool]:
        """Seconds left of the stage that runs and of all, and whether the stage's was timed (else guessed)."""
        stage, ended = self.current, sum(self.stages[s.name] for s in self.run.values() if s.ended is not None)
        weight = self.stages[stage.name] if stage else 0.0
        here = stage.left(now) if stage else 0.0
        if stage and here is not None and ended + weight > 0:
            scale = (now - self.begun + here) / (ended + weight)  # seconds that really pass in a guessed second
        elif ended > 0:
            scale = (max(s.ended for s in self.run.values() if s.ended is not None) - self.begun) / ended
        else:
            scale = 1.0
        timed = here is not None
        if not timed:
            here = max(scale * weight - stage.elapsed(now), 0.0)
        return here, here + scale * self._coming(), timed

    def share(self) -> float:
        """How much of the whole run is done, by the guessed durations: 0 to 1."""
        whole, missing = sum(self.stages.values()), self._coming()
        for stage in self.run.values():
            if stage.total and not stage.finished:
                missing += self.stages[stage.name] * max(1 - stage.done / stage.total, 0)
        return 1 - missing / whole if whole else 1.0

    def _coming(self):
        """The weight of the stages that follow the last one begun."""
        names = list(self.stages)
        after = names.index(next(reversed(self.run))) + 1 if self.run else 0
        return sum(self.stages[name] for name in names[after:] if name not in self.run)

    def _report(self, stage, now):
        if now - self._printed >= self.interval:
            self._line(stage, now)

    def _line(self, stage, now):
        self._printed = now
        if self._live is None:
            self._console.print(lines.plain(self, stage, now), soft_wrap=True, markup=False, highlight=False)
