"""Where a run reports: its folder, its log, the terminal."""

import contextlib
import dataclasses
import json
import pathlib
import platform
import shutil
import subprocess
from importlib import metadata

import jax

from pt_jax import folders
from pt_jax.tracking import metrics, plots, sinks
from pt_jax.tracking.metrics import JsonlLog
from pt_jax.tracking.progress import Progress
from pt_jax.tracking.tracker import Tracker
from pt_jax.training import checkpoints

TRAINING = ("sft", "dpo", "grpo")
LOGS = ("metrics.jsonl", "run.json")  # what a run writes into its folder beside the model
TOKEN = "process_0"  # there while several processes find out whether all see this folder
TORN = tuple(metrics.fresh(name).name for name in ("metrics.jsonl", "samples.jsonl"))  # of a run that was killed
KEPT = ("checkpoints", "samples.jsonl", "tensorboard", "wandb", "profile", "steps", TOKEN)  # and what some runs write


def check_out(out, *, overwrite: bool, resume: str = "never", **inputs) -> None:
    """Fails with a sentence unless a training run may make its folder here.

    A folder is replaced only when it is asked for, when it holds a model or what such a run left, and when nothing
    that the run reads is in it.

    Args:
      out: the folder to make.
      overwrite: whether one that is there may be replaced.
      resume: whether the checkpoints of a run that was stopped are gone on from ("auto", or a step) or not ("never").
      **inputs: name of an option to the path that it gives, or None.
    """
    check_place(out, **inputs)
    folders.tidy(out)
    folders.check_writable(out, overwrite=overwrite)
    path = pathlib.Path(out).resolve()
    if path.is_dir() and any(path.iterdir()) and not _is_a_model(path):
        raise ValueError(f"--out {out}: holds no model, so --overwrite does not replace it; give another folder")
    check_aside(out)
    if resume == "never" and not overwrite and checkpoints.complete(unfinished(out) / "checkpoints"):
        raise ValueError(
            f"--out {out}: {unfinished(out)} has checkpoints of a run that was stopped; give --resume auto to go on, "
            "or --overwrite to begin anew"
        )


def check_aside(out) -> None:
    """Fails unless a run of ``out`` may have its logs beside it: in a new folder, or in one that a run has left.

    What else is in such a one stays where it is, and what the system puts down anywhere (.DS_Store, .nfs0001) makes no
    folder another's.
    """
    folder, other = unfinished(out), _of_no_run(unfinished(out))
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if there == {*other} and (seen := [name for name in other if not name.startswith(".")]):
        raise ValueError(
            f"--out {out}: its logs go into {folder}, which has no run's logs but {', '.join(seen)}; move that away, "
            "or give another folder"
        )
    folders.check_writable(folder, keep=there)


def _of_no_run(folder) -> list[str]:
    """The names of what is in a run's folder and was not put there by a run."""
    known = {*LOGS, *TORN, *(path.name for path in _kept(folder))}
    return sorted({path.name for path in folder.iterdir()} - known) if folder.is_dir() else []


def check_place(out, **inputs) -> None:
    """Fails when a folder that may be replaced is, or contains, something that must stay."""
    path, here = pathlib.Path(out).resolve(), pathlib.Path.cwd()
    for name, given in inputs.items():
        if given is not None and path in (of := pathlib.Path(given).resolve(), *of.parents):
            raise ValueError(f"--out {out} would replace {name} {given}; give a folder that does not contain it")
    if path in (here, *here.parents):
        raise ValueError(f"--out {out} is the folder that the command runs in, or one above it; give another one")


def _is_a_model(path) -> bool:
    """Whether the config of a model or of an adapter is there, or the logs of a training command."""
    config = _read(path / "config.json") | _read(path / "adapter_config.json")
    return (
        not config.keys().isdisjoint(("model_type", "peft_type")) or _read(path / "run.json").get("command") in TRAINING
    )


def finished(out) -> dict | None:
    """The run.json of the training command whose model is at ``out``; None where there is no such model."""
    folders.tidy(out)
    path = pathlib.Path(out).resolve()
    about = _read(path / "run.json")
    whole = about.get("command") in TRAINING and "options" in about and any(path.glob("*.safetensors"))
    return about if whole else None


def _read(file) -> dict:
    """The object in a JSON file, an empty one where there is none."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def unfinished(out) -> pathlib.Path:
    """The folder beside ``out`` that has a run's logs until there is a model to go with them."""
    path = pathlib.Path(out).resolve()
    return path.with_name(path.name + ".unfinished")


def _kept(folder) -> list[pathlib.Path]:
    """What runs have left in a folder beside their logs."""
    return [*(folder / name for name in KEPT if (folder / name).exists()), *folder.glob("bad_step_*.npz")]


@contextlib.contextmanager
def opened(folder, options, stages: dict, done: int | None = None, inputs: dict | None = None):
    """A tracker that writes into a run's folder: options and versions in run.json, metrics in metrics.jsonl.

    Called once all input is known to be good, because it makes the folder. An error that ends the run is given this
    folder as ``left_in``, for whoever tells the user.

    Args:
      folder: of the run.
      options: its record of options.
      stages: name to guessed seconds, in order.
      done: the step that an earlier process's checkpoint is of; None begins anew.
      inputs: checksums of what it reads.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in TORN:
        (folder / name).unlink(missing_ok=True)
    if done is None:
        for path in (*(folder / name for name in LOGS), *_kept(folder)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    else:
        metrics.cut(folder / "samples.jsonl", done)
    said = about(options) | {"inputs": inputs or {}, "resumed_from": done}
    (folder / "run.json").write_text(json.dumps(said, indent=2) + "\n")
    try:
        with (
            JsonlLog(folder / "metrics.jsonl", done) as log,
            Progress(stages) as progress,
            contextlib.ExitStack() as stack,
        ):
            tracker = Tracker(progress, log)
            for name in getattr(options, "track", ()):
                try:
                    sink = sinks.opened(name, folder, dataclasses.asdict(options), done or 0)
                except Exception as e:
                    tracker.warn(f"{name} could not be opened and gets no metrics: {type(e).__name__}: {e}")
                    continue
                tracker.logs.append(sink)
                stack.callback(_close, sink, tracker)
            yield tracker
    except BaseException as e:
        e.left_in = folder
        raise


def _close(sink, tracker):
    try:
        sink.close()
    except Exception as e:
        tracker.warn(f"{sink.name} failed at the end: {type(e).__name__}: {e}")


def about(options) -> dict:
    """What a run is: its options, the versions of what it runs on, the git revision of where it runs, if any."""
    versions = {name: metadata.version(name) for name in ("pt_jax", "jax", "jaxlib", "numpy", "transformers")}
    said = {"command": type(options).__name__.lower(), "options": dataclasses.asdict(options)}
    return said | {"versions": versions | {"python": platform.python_version()}, "git": _revision()}


def _revision() -> str | None:
    """The commit that is checked out here, with a + when files differ from it; None where there is no repository."""
    try:
        git = lambda *words: subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, check=True)
        changed = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
        return git("rev-parse", "HEAD").stdout.strip() + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


@contextlib.contextmanager
def stage(options, name: str, total: int, tracker=None, done: int | None = None, inputs: dict | None = None):
    """One stage of a run: of the tracker that is given, or of a new one.

    A new one logs into ``unfinished(options.out)``, so that an earlier run's folder stays as it is until the new model
    replaces it; the caller puts the logs beside the model before the block ends. What else the run left, such as its
    checkpoints, is then moved there.

    Gives (tracker, stage, logs), the last being the paths of the run's own logs.
    """
    with contextlib.ExitStack() as stack:
        logs = ()
        if tracker is None and jax.process_index():
            tracker = Tracker()  # number 0 tells of the run, and writes
        if tracker is None:
            folder = unfinished(options.out)
            tracker = stack.enter_context(opened(folder, options, {name: 60.0}, done, inputs))
            logs = tuple(folder / log for log in LOGS)
            if other := _of_no_run(folder):
                tracker.warn(f"{folder} has {', '.join(other)}, which is of no run; it stays there")
        yield tracker, stack.enter_context(tracker.stage(name, total, done or 0)), logs
    if logs:
        close(options.out)


def close(out) -> None:
    """Moves what a run has left beside its logs to its model, and removes the logs, of which the model has copies."""
    folder, path = unfinished(out), pathlib.Path(out).resolve()
    for left in _kept(folder):
        if path.is_dir() and not (path / left.name).exists():
            left.rename(path / left.name)
    for log in LOGS:
        (folder / log).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody put something in
        folder.rmdir()


def left_open(out) -> bool:
    """Whether the logs in ``unfinished(out)`` are those of the model at ``out``: its run did not get to ``close``."""
    logs = [log for log in LOGS if (unfinished(out) / log).is_file()]
    same = lambda log: (unfinished(out) / log).read_bytes() == (pathlib.Path(out) / log).read_bytes()
    return bool(logs) and all((pathlib.Path(out) / log).is_file() and same(log) for log in logs)


def draw(folder) -> None:
    """The curves of a run's metrics as curves.png, those of them that it has; without any, no picture.

    What was measured on rows that are not trained on stands beside the same of those that are.
    """
    records, panels = metrics.read(folder / "metrics.jsonl"), []
    for name in dict.fromkeys(record["stage"] for record in records):
        known = {metric for record in records if record["stage"] == name for metric in record}
        for panel in plots.PANELS.get(name, ()):
            both = dict.fromkeys(x for metric in panel.metrics for x in (metric, f"eval_{metric}"))
            if has := tuple(metric for metric in both if metric in known):
                panels.append(dataclasses.replace(panel, metrics=has))
    if panels:
        plots.curves(records, folder / "curves.png", panels)
