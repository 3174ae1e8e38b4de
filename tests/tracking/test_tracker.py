"""The tracker: one report goes to the file and to the terminal."""

import io

import pytest
from rich.console import Console

from pt_jax.tracking.metrics import JsonlLog, read
from pt_jax.tracking.progress import Progress
from pt_jax.tracking.tracker import Tracker


def test_a_step_is_written_and_shown(tmp_path):
    out = io.StringIO()
    with (
        JsonlLog(tmp_path / "m.jsonl") as log,
        Progress({"sft": 1}, console=Console(file=out, force_terminal=False, force_interactive=False)) as progress,
    ):
        tracker = Tracker(progress, log)
        with tracker.stage("sft", 4) as stage:
            stage.step(1)  # nothing was fetched: nothing is written
            stage.step(2, {"loss": 1.5, "rewards/margins": 0.25})
            stage.step(2, {"eval_reward": 0.5})
        tracker.print("after")
    assert read(tmp_path / "m.jsonl") == [
        {"stage": "sft", "step": 2, "loss": 1.5, "rewards/margins": 0.25},
        {"stage": "sft", "step": 2, "eval_reward": 0.5},
    ]
    assert "sft  2/4" in out.getvalue() and "rewards/margins 0.25  eval_reward 0.5\nafter" in out.getvalue()


def test_without_progress_it_writes_and_without_a_file_it_shows(tmp_path):
    with JsonlLog(tmp_path / "m.jsonl") as log:
        tracker = Tracker(log=log)
        tracker.print("nowhere")
        with tracker.stage("sft", 1) as stage:
            stage.step(1, {"loss": 1.0})
    assert len(read(tmp_path / "m.jsonl")) == 1
    with Progress({"sft": 1}, console=Console(quiet=True)) as progress:
        with Tracker(progress).stage("sft", 1) as stage:
            stage.step(1, {"loss": 1.0})
        assert progress.run["sft"].done == 1


def test_a_warning_is_one_line_shown_and_kept_with_brackets_as_they_stand():
    out = io.StringIO()
    console = Console(file=out, width=40, force_terminal=False, force_interactive=False)
    with Progress({"sft": 1}, console=console) as progress:
        tracker = Tracker(progress)
        tracker.warn("runs/[red]a is " + "long " * 10)
    Tracker().warn("nowhere")
    assert out.getvalue() == "Warning: runs/[red]a is " + "long " * 10 + "\n"
    assert tracker.warnings == ["runs/[red]a is " + "long " * 10]


@pytest.mark.parametrize("name", ["step", "stage"])
def test_a_metric_may_not_take_the_name_of_the_step_or_the_stage(name):
    with Tracker().stage("sft", 1) as stage, pytest.raises(ValueError, match=rf"\['{name}'\].*rename"):
        stage.step(1, {name: 1.0})
