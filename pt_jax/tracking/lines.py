"""The lines that ``progress`` shows: durations, rates, bars and metrics as text."""

_WIDE = 150  # from this many columns on, the metrics stand in the line of their stage


def duration(seconds: float) -> str:
    """
    >>> duration(58.4), duration(62), duration(3723)
    ('0:58', '1:02', '1:02:03')
    """
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def speed(rate: float | None) -> str:
    """
    >>> speed(3.14159), speed(120.4), speed(0.05), speed(None)
    ('3.1 step/s', '120 step/s', '20.0 s/step', '- step/s')
    """
    if not rate:
        return "- step/s"
    if rate < 0.1:
        return f"{1 / rate:.1f} s/step"
    return f"{rate:.2f} step/s" if rate < 1 else f"{rate:.1f} step/s" if rate < 100 else f"{rate:.0f} step/s"


def chosen(metrics: dict, show: tuple, most: int = 4) -> str:
    """Up to ``most`` metrics, those of ``show`` first.

    >>> chosen({"kl": 0.01234567, "a": 2.0, "loss": 1.23}, show=("loss",), most=2)
    'loss 1.23  kl 0.01235'
    """
    names = [n for n in show if n in metrics] + [n for n in metrics if n not in show]
    return "  ".join(f"{name} {metrics[name]:.4g}" for name in names[:most])


def bar(share: float, width: int, ascii_only: bool = False) -> tuple[str, str]:
    """The filled and the empty part of a bar.

    >>> bar(0.25, 8, ascii_only=True)
    ('==', '------')
    """
    full, empty = ("=", "-") if ascii_only else ("━", "─")
    n = int(min(max(share, 0.0), 1.0) * width)
    return full * n, empty * (width - n)


def facts(progress, stage, now) -> list[str]:
    """Count, rate, time left and elapsed time of a stage."""
    if stage.ended is not None:
        left = "done" if stage.finished else "stopped"
    else:
        seconds, _, timed = progress.left(now)
        left = f"{'' if timed else '~'}{duration(seconds)} left"
    return [f"{stage.done}/{stage.total}", speed(stage.rate()), left, f"{duration(stage.elapsed(now))} gone"]


def everything(progress, now) -> list[str]:
    """The share done, time left and elapsed time of the whole run."""
    _, left, timed = progress.left(now)
    timed = timed and any(s.rate() for s in progress.run.values())
    left = f"{'' if timed else '~'}{duration(left)} left"
    if not progress.current and any(not s.finished for s in progress.run.values()):
        left = "stopped"
    elif not progress.current and progress.share() == 1:
        left = "done"
    return [f"{progress.share():.0%}", left, f"{duration(now - progress.begun)} gone"]


def plain(progress, stage, now) -> str:
    """One line for where there is no terminal."""
    words = [stage.name, *facts(progress, stage, now), chosen(stage.metrics, progress.show)]
    if len(progress.stages) > 1:
        words.append(f"(all {', '.join(everything(progress, now)[:2])})")
    return "  ".join(w for w in words if w)


class Display:
    """What stands on the terminal at one moment, drawn for the width it has."""

    def __init__(self, progress, now):
        self.progress, self.now = progress, now

    def __rich_console__(self, console, options):
        progress, wide = self.progress, options.max_width >= _WIDE
        rows = {name: facts(progress, stage, self.now) for name, stage in progress.run.items()}
        name = max(map(len, (*progress.stages, "all")))
        count, left, gone = everything(progress, self.now)
        cells = [count, "", left, gone]
        size = [max([n, *(len(f[i]) for f in (*rows.values(), cells))]) for i, n in enumerate((7, 11, 10, 9))]
        width = min(max(options.max_width - name - sum(size) - 10, 6), 24)
        for n in progress.stages:
            if n not in rows:
                yield self._line(n.ljust(name), bar(0, width, options.ascii_only), "", "dim")
                continue
            stage, text = progress.run[n], self._aligned(rows[n], size)
            share = stage.done / stage.total if stage.total else 1.0
            metrics = chosen(stage.metrics, progress.show)
            style = "cyan" if stage.ended is None else "green" if stage.finished else "red"
            text += f"  {metrics}" if wide else ""
            yield self._line(n.ljust(name), bar(share, width, options.ascii_only), text, style)
            if metrics and not wide:
                yield self._line(" " * name, ("", ""), metrics, style)
        if len(progress.stages) > 1:
            drawn = bar(progress.share(), width, options.ascii_only)
            yield self._line("all".ljust(name), drawn, self._aligned(cells, size), "bold")

    def _aligned(self, cells, size):
        return "  ".join(cell.rjust(n) for cell, n in zip(cells, size))

    def _line(self, name, drawn, text, style):
        from rich.text import Text

        return Text.assemble(
            (name, style), "  ", (drawn[0], style), (drawn[1], "dim"), "  " if drawn != ("", "") else "", text,
            no_wrap=True, overflow="ellipsis",
        )  # fmt: skip
