"""What a run may replace, and what it leaves when it ends early: an earlier run stays until a new one is whole."""

import dataclasses
import json

import pytest

from pt_jax.commands import runs
from pt_jax.tracking import metrics
from pt_jax.tracking.tracker import Tracker


@dataclasses.dataclass
class SFT:
    out: str


def contents(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def project(tmp_path):
    """A folder such as people have: an earlier run, its data beside it, and what must never go."""
    (tmp_path / "project/run").mkdir(parents=True)
    (tmp_path / "project/run/config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "project/config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "project/data.jsonl").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "project")
    return tmp_path / "project"


@pytest.mark.parametrize("out", ["project", "project/run", "project/../project", "link", "link/run", "."])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_a_run_reads_is_never_replaced(project, monkeypatch, out, overwrite):
    monkeypatch.chdir(project.parent)
    before = contents(project)
    inputs = {"--model": "link/run", "--data": "project/data.jsonl", "--eval-data": None}
    with pytest.raises(ValueError, match=r"^--out \S+ would replace --model link/run; give a folder"):
        runs.check_out(out, overwrite=overwrite, **inputs)
    assert contents(project) == before


@pytest.mark.parametrize("out", [".", "..", "../project"])
def test_the_folder_that_the_command_runs_in_is_never_replaced(project, monkeypatch, out):
    monkeypatch.chdir(project)
    with pytest.raises(ValueError, match="is the folder that the command runs in, or one above it"):
        runs.check_out(out, overwrite=True)


@pytest.mark.parametrize(
    ("files", "may"),
    [
        ({"config.json": '{"model_type": "llama"}'}, True),
        ({"run.json": '{"command": "sft"}'}, True),
        ({"run.json": '{"command": "quickstart"}'}, False),  # it has the models of all its stages
        ({"config.json": '{"port": 80}'}, False),
        ({"config.json": "[]"}, False),
        ({"config.json": "{"}, False),
        ({"thesis.tex": "years of work"}, False),
        ({}, True),
    ],
)
def test_only_a_model_is_replaced(tmp_path, files, may):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    if may:
        return runs.check_out(tmp_path, overwrite=True)
    with pytest.raises(ValueError, match=r"holds no model, so --overwrite does not replace it"):
        runs.check_out(tmp_path, overwrite=True)


def test_nothing_is_replaced_unasked(project):
    with pytest.raises(ValueError, match="exists and is not empty"):
        runs.check_out(project / "run", overwrite=False)
    assert runs.check_out(project / "new", overwrite=False) is None


def test_a_folder_that_only_looks_like_a_runs_logs_is_not_written_into(project):
    (project / "new.unfinished").mkdir()
    (project / "new.unfinished/thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"into \S+new.unfinished, which has no run's logs but thesis.tex; move that"):
        runs.check_out(project / "new", overwrite=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, FloatingPointError])
def test_a_run_that_ends_early_leaves_its_logs_aside_and_the_earlier_run_as_it_was(project, error):
    (project / "run/metrics.jsonl").write_text("old")
    before = contents(project)
    with pytest.raises(error) as raised, runs.stage(SFT(str(project / "run")), "sft", 3) as (_, on, logs):
        on.step(1, {"loss": 2.0})
        assert [p.name for p in logs] == ["metrics.jsonl", "run.json"] and contents(project).items() > before.items()
        raise error
    aside = project / "run.unfinished"
    assert raised.value.left_in == aside
    assert metrics.read(aside / "metrics.jsonl") == [{"stage": "sft", "step": 1, "loss": 2.0}]
    assert json.loads((aside / "run.json").read_text())["command"] == "sft"
    assert {k: v for k, v in contents(project).items() if not k.startswith("run.unfinished")} == before
    # the next run begins anew
    with runs.stage(SFT(str(project / "run")), "sft", 3) as (_, on, logs):
        on.step(1, {"loss": 3.0})
        assert [r["loss"] for r in metrics.read(logs[0])] == [3.0]
    assert not aside.exists()


@pytest.mark.parametrize("done", [None, 0])
def test_what_lies_about_beside_the_logs_keeps_no_run_from_starting_again(project, monkeypatch, done):
    """A killed run's own leftover goes, what the system or somebody put there stays and is told."""
    aside, out = project / "new.unfinished", project / "new"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(metrics.pathlib.Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        aside.mkdir()
        (aside / "samples.jsonl").write_text('{"step": 1}\n')
        metrics.cut(aside / "samples.jsonl", 0)
    (aside / "samples.jsonl").unlink()
    (aside / ".metrics.jsonl.new").write_text("")
    (aside / ".nfs0001").write_text("")
    assert {p.name for p in aside.iterdir()} == {".metrics.jsonl.new", ".samples.jsonl.new", ".nfs0001"}
    for overwrite in (False, True):
        runs.check_out(out, overwrite=overwrite, resume="auto")
    (aside / "metrics.jsonl").write_text("")
    (aside / "notes").write_text("mine")
    runs.check_out(out, overwrite=False, resume="auto")
    with runs.stage(SFT(str(out)), "sft", 1, done=done) as (tracker, on, _):
        on.step(1, {"loss": 1.0})
    assert tracker.warnings == [f"{aside} has .nfs0001, notes, which is of no run; it stays there"]
    assert contents(aside) == {".nfs0001": "", "notes": "mine"}


def test_what_somebody_put_beside_the_logs_stays(project):
    with runs.stage(SFT(str(project / "run")), "sft", 1):
        (project / "run.unfinished/notes").write_text("mine")
    assert contents(project / "run.unfinished") == {"notes": "mine"}


def test_a_stage_of_a_given_tracker_has_no_logs_of_its_own(project):
    before = contents(project)
    with runs.stage(SFT(str(project / "run")), "sft", 1, Tracker()) as (_, on, logs):
        on.step(1, {"loss": 1.0})
    assert logs == () and contents(project) == before
