"""Curves of a run: a grid of panels from its JSON lines to one PNG."""

import dataclasses
import io
import math
import pathlib
from collections.abc import Mapping, Sequence

_COLOURS = ("#1f5fa8", "#d1603d", "#2e8b6f", "#8a5aa8", "#b8892b", "#5b6670")
_INK, _PALE = "#2b2f36", "#dfe3e8"
_FEW = 30  # a curve of fewer points has them marked


@dataclasses.dataclass(frozen=True)
class Panel:
    """One panel: some metrics of one stage over its steps, on one axis.

    Attributes:
      title: above the panel.
      stage: whose records are drawn.
      metrics: a curve each; put metrics of different size into panels of their own.
      ylabel: what is measured, with its unit.
      log: whether the axis is logarithmic; values that are not positive are then not drawn.
      references: label to the height of a dashed line.
    """

    title: str
    stage: str
    metrics: Sequence[str]
    ylabel: str
    log: bool = False
    references: Mapping[str, float] = dataclasses.field(default_factory=dict)


# What one looks at first in each kind of training, by the name of its stage.
PANELS = {
    "pretrain": (Panel("Pretraining: loss", "pretrain", ("loss",), "nats / token"),),
    "sft": (Panel("SFT: loss", "sft", ("loss",), "nats / token"),),
    "dpo": (
        Panel("DPO: reward margin", "dpo", ("rewards/margins",), "chosen − rejected", references={"start": 0.0}),
        Panel("DPO: pairs ranked right", "dpo", ("rewards/accuracies",), "share", references={"chance": 0.5}),
        Panel("DPO: log-probability", "dpo", ("logps/chosen", "logps/rejected"), "nats / answer"),
    ),
    "grpo": (
        Panel("GRPO: reward and held-out accuracy", "grpo", ("reward", "eval_reward"), "mean"),
        Panel("GRPO: distance from the reference", "grpo", ("kl",), "nats / token"),
        Panel("GRPO: entropy", "grpo", ("entropy",), "nats / token"),
        Panel("GRPO: clipped tokens", "grpo", ("clip_ratio/low_mean", "clip_ratio/high_mean"), "share"),
    ),
}


def curves(records: Sequence[dict], path, panels: Sequence[Panel]) -> None:
    """Draws the panels into one PNG.

    Args:
      records: as ``metrics.read`` returns them.
      path: the file to write; an existing one is replaced.
      panels: in reading order.

    Raises:
      ValueError: there are no panels, a metric never occurs in its stage, or the file cannot be written.
    """
    png = io.BytesIO()
    figure(records, panels).savefig(png, format="png", dpi=150)
    try:
        pathlib.Path(path).write_bytes(png.getvalue())
    except OSError as e:
        raise ValueError(f"{path}: cannot be written ({e.strerror}); give another place") from e


def figure(records: Sequence[dict], panels: Sequence[Panel]):
    """The panels as a ``matplotlib.figure.Figure``, for a notebook; see ``curves``."""
    from matplotlib.figure import Figure

    if not panels:
        raise ValueError("panels is empty; give at least one Panel")
    points = [[_points(records, panel, metric) for metric in panel.metrics] for panel in panels]
    across = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    down = math.ceil(len(panels) / across)
    fig = Figure(figsize=(4.6 * across, 3.1 * down), layout="constrained", facecolor="white")
    fig.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    grid = fig.add_gridspec(down, across)
    for i, (panel, series) in enumerate(zip(panels, points)):
        _draw(fig.add_subplot(grid[divmod(i, across)]), panel, series)
    return fig


def _points(records, panel, metric):
    """The steps and values of one metric in one stage."""
    own = [r for r in records if r["stage"] == panel.stage]
    found = [(r["step"], r[metric]) for r in own if metric in r]
    if not found:
        known = sorted({name for r in own for name in r} - {"stage", "step"})
        stages = sorted({r["stage"] for r in records})
        seen = f"that stage has {known}" if own else f"the records have the stages {stages}"
        raise ValueError(f"panel {panel.title!r}: metric {metric!r} never occurs in stage {panel.stage!r}; {seen}")
    return tuple(zip(*found))


def _draw(ax, panel, series):
    from matplotlib.ticker import MaxNLocator

    for colour, metric, (steps, values) in zip(_cycle(len(series)), panel.metrics, series):
        lost = sum(not math.isfinite(v) for v in values)
        label = f"{metric} ({lost} of {len(values)} not finite)" if lost else metric
        few = {"marker": "o", "markersize": 3.5} if len(values) < _FEW else {}
        drawn = [v if math.isfinite(v) else math.nan for v in values]  # a gap in the curve
        ax.plot(steps, drawn, color=colour, linewidth=1.6, label=label, solid_capstyle="round", **few)
    for style, (label, height) in zip(("--", ":", "-."), panel.references.items()):
        ax.axhline(height, color="#7a828c", linewidth=1.1, linestyle=style, label=label, zorder=1)
    if panel.log and any(0 < v < math.inf for _, values in series for v in values):
        ax.set_yscale("log", nonpositive="mask")
    else:
        ax.ticklabel_format(axis="y", useOffset=False)
    ax.set_title(panel.title, loc="left", fontsize=11, fontweight="bold", color=_INK, pad=8)
    ax.set_xlabel("step", fontsize=9, color=_INK)
    ax.set_ylabel(panel.ylabel, fontsize=9, color=_INK)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.margins(x=0.02, y=0.08)
    ax.grid(True, color=_PALE, linewidth=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8.5, colors=_INK, length=0)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color("#b4bbc4")
    handles, labels = ax.get_legend_handles_labels()
    if len(handles) > 1 or any("not finite" in label for label in labels):
        ax.legend(fontsize=8.5, frameon=True, framealpha=0.85, edgecolor="none", labelcolor=_INK)


def _cycle(n):
    return [_COLOURS[i % len(_COLOURS)] for i in range(n)]
