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


class Dying:
    name = "Dying"

    def __init__(self):
        self.got = []

    def log(self, step, stage, **metrics):
        if step == 2:
            raise OSError(28, "No space left on device")
        self.got.append(step)


def test_a_log_that_fails_is_told_once_and_left_out_and_the_others_go_on(tmp_path):
    dying = Dying()
    with JsonlLog(tmp_path / "m.jsonl") as log:
        tracker = Tracker(None, dying, log)
        with tracker.stage("sft", 4) as stage:
            for step in (1, 2, 3, 4):
                stage.step(step, {"loss": 1.0})
    assert dying.got == [1] and [r["step"] for r in read(tmp_path / "m.jsonl")] == [1, 2, 3, 4]
    assert tracker.warnings == [
        "Dying failed at step 2 and gets no more metrics: OSError: [Errno 28] No space left on device"
    ]


def test_a_metric_that_is_no_number_is_the_callers_mistake_and_not_the_logs():
    with (
        Tracker(None, Dying()).stage("sft", 1) as stage,
        pytest.raises(ValueError, match="loss must be a number, got str"),
    ):
        stage.step(1, {"loss": "1.0"})


def test_a_stage_that_goes_on_times_only_its_own_steps():
    now = [0.0]
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=False, force_interactive=False)
    progress = Progress({"sft": 1}, console=console, clock=lambda: now[0], interval=0)
    with progress, Tracker(progress).stage("sft", 100, done=40) as stage:
        now[0] = 10.0
        stage.step(50, {"loss": 1.0})
    lines = out.getvalue().splitlines()
    assert "40/100" in lines[0] and "50/100  1.0 step/s" in lines[1] and "0:50 left" in lines[1]
