"""Where a run reports: its folder, its log, the terminal."""

import contextlib
import dataclasses
import json
import pathlib
import platform
from importlib import metadata

from pt_jax import folders
from pt_jax.tracking.metrics import JsonlLog
from pt_jax.tracking.progress import Progress
from pt_jax.tracking.tracker import Tracker

TRAINING = ("sft", "dpo", "grpo")
LOGS = ("metrics.jsonl", "run.json")  # what a run writes into its folder beside the model


def check_out(out, *, overwrite: bool, **inputs) -> None:
    """Fails with a sentence unless a training run may make its folder here.

    A folder is replaced only when it is asked for, when it holds a model or what such a run left, and when nothing
    that the run reads is in it.

    Args:
      out: the folder to make.
      overwrite: whether one that is there may be replaced.
      **inputs: name of an option to the path that it gives, or None.
    """
    check_place(out, **inputs)
    folders.check_writable(out, overwrite=overwrite)
    path = pathlib.Path(out).resolve()
    if path.is_dir() and any(path.iterdir()) and not _is_a_model(path):
        raise ValueError(f"--out {out}: holds no model, so --overwrite does not replace it; give another folder")
    folders.check_writable(unfinished(out), keep=LOGS)


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


@contextlib.contextmanager
def opened(folder, options, stages: dict):
    """A tracker that writes into a run's folder: options and versions in run.json, metrics in metrics.jsonl.

    Called once all input is known to be good, because it makes the folder. An error that ends the run is given this
    folder as ``left_in``, for whoever tells the user.

    Args:
      folder: of the run.
      options: its record of options.
      stages: name to guessed seconds, in order.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in LOGS:
        (folder / name).unlink(missing_ok=True)
    versions = {name: metadata.version(name) for name in ("pt_jax", "jax", "jaxlib", "numpy", "transformers")}
    about = {"command": type(options).__name__.lower(), "options": dataclasses.asdict(options)}
    about["versions"] = versions | {"python": platform.python_version()}
    (folder / "run.json").write_text(json.dumps(about, indent=2) + "\n")
    try:
        with JsonlLog(folder / "metrics.jsonl") as log, Progress(stages) as progress:
            yield Tracker(progress, log)
    except BaseException as e:
        e.left_in = folder
        raise


@contextlib.contextmanager
def stage(options, name: str, total: int, tracker=None):
    """One stage of a run: of the tracker that is given, or of a new one.

    A new one logs into ``unfinished(options.out)``, so that an earlier run's folder stays as it is until the new model
    replaces it; the caller puts the logs beside the model before the block ends.

    Gives (tracker, stage, logs), the last being the paths of the run's own logs.
    """
    with contextlib.ExitStack() as stack:
        logs = ()
        if tracker is None:
            folder = unfinished(options.out)
            tracker = stack.enter_context(opened(folder, options, {name: 60.0}))
            logs = tuple(folder / log for log in LOGS)
        yield tracker, stack.enter_context(tracker.stage(name, total)), logs
    for log in logs:
        log.unlink()
    for folder in {log.parent for log in logs}:
        with contextlib.suppress(OSError):  # somebody put something in
            folder.rmdir()
