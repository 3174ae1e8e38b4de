"""Curves: every panel asked for is drawn, or a sentence says which number is missing."""

import math

import pytest

from pt_jax.tracking.plots import PANELS, Panel, curves, figure


def records(stage, n=40, **values):
    return [{"stage": stage, "step": i, **{k: f(i) for k, f in values.items()}} for i in range(1, n + 1)]


LOSS = Panel("loss", "sft", ("loss",), "nats")


def test_the_png_has_a_panel_for_each_asked_for(tmp_path):
    panels = [panel for stage in PANELS.values() for panel in stage]
    rows = [row for p in panels for row in records(p.stage, **dict.fromkeys(p.metrics, math.sqrt))]
    curves(rows, tmp_path / "curves.png", panels)
    from matplotlib.image import imread

    pixels = imread(tmp_path / "curves.png")
    assert pixels.shape[0] > 600 and pixels.shape[1] > 1000 and pixels[..., :3].std() > 0.02
    axes = figure(rows, panels).axes
    assert [ax.get_title(loc="left") for ax in axes] == [panel.title for panel in panels]
    assert all(ax.get_xlabel() == "step" and ax.get_ylabel() == p.ylabel for ax, p in zip(axes, panels))


def test_a_curve_is_the_metric_of_its_own_stage():
    others = [*records("dpo", loss=lambda i: -1.0), {"stage": "sft", "step": 41, "lr": 1.0}]
    rows = records("sft", loss=float) + others
    (line,) = figure(rows, [LOSS]).axes[0].lines
    assert list(line.get_xdata()) == list(line.get_ydata()) == list(range(1, 41))


def test_few_points_are_marked_and_many_are_not():
    for n, marker in ((29, "o"), (30, "None")):
        (line,) = figure(records("sft", n, loss=float), [LOSS]).axes[0].lines
        assert line.get_marker() == marker


def test_a_legend_stands_where_there_are_several_curves_and_names_the_references():
    rows = records("sft", loss=float, other=float)
    two = Panel("two", "sft", ("loss", "other"), "nats")
    line = Panel("line", "sft", ("loss",), "nats", references={"before": 7.0})
    legends = [ax.get_legend() for ax in figure(rows, [LOSS, two, line]).axes]
    assert legends[0] is None
    assert [[t.get_text() for t in legend.get_texts()] for legend in legends[1:]] == [
        ["loss", "other"],
        ["loss", "before"],
    ]
    assert set(figure(rows, [line]).axes[0].lines[1].get_ydata()) == {7.0}


def test_values_that_are_not_finite_leave_a_gap_and_are_counted():
    rows = records("sft", 10, loss=lambda i: {3: math.nan, 4: math.inf}.get(i, 1.0))
    ax = figure(rows, [LOSS]).axes[0]
    assert [math.isnan(v) for v in ax.lines[0].get_ydata()] == [i in (3, 4) for i in range(1, 11)]
    assert ax.get_legend().get_texts()[0].get_text() == "loss (2 of 10 not finite)"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, -1.0, 1e-9, math.nan])
@pytest.mark.parametrize("log", [False, True])
def test_a_curve_of_any_one_value_can_be_drawn(tmp_path, value, log):
    panel = Panel("loss", "sft", ("loss",), "nats", log=log)
    assert figure(records("sft", 3, loss=float), [panel]).axes[0].get_yscale() == ("log" if log else "linear")
    for n in (1, 3):
        curves(records("sft", n, loss=lambda i: value), tmp_path / "c.png", [panel])


def test_a_metric_that_never_occurs_is_named_with_its_stage():
    panel = Panel("margins", "dpo", ("rewards/margins",), "nats")
    with pytest.raises(ValueError, match=r"'rewards/margins' never .* stage 'dpo'; that stage has \['loss'\]"):
        figure(records("dpo", loss=float), [panel])
    with pytest.raises(ValueError, match=r"never occurs in stage 'dpo'; the records have the stages \['sft'\]"):
        figure(records("sft", loss=float), [panel])


def test_no_panels_and_no_folder_are_sentences(tmp_path):
    with pytest.raises(ValueError, match="panels is empty"):
        curves([], tmp_path / "c.png", [])
    with pytest.raises(ValueError, match="cannot be written"):
        curves(records("sft", loss=float), tmp_path / "nowhere" / "c.png", [LOSS])
