"""Where a run reports: its folder, its log, the terminal."""

import contextlib
import dataclasses
import json
import pathlib
import platform
from importlib import metadata

from pt_jax.tracking.metrics import JsonlLog
from pt_jax.tracking.progress import Progress
from pt_jax.tracking.tracker import Tracker

LOGS = ("metrics.jsonl", "run.json")  # what a run writes into its folder beside the model


@contextlib.contextmanager
def opened(folder, options, stages: dict):
    """A tracker that writes into a run's folder: options and versions in run.json, metrics in metrics.jsonl.

    Called once all input is known to be good, because it makes the folder.

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
    with JsonlLog(folder / "metrics.jsonl") as log, Progress(stages) as progress:
        yield Tracker(progress, log)


@contextlib.contextmanager
def stage(options, name: str, total: int, tracker=None):
    """One stage of a run: of the tracker that is given, or of a new one in the folder of ``options.out``.

    Gives (tracker, stage).
    """
    with contextlib.ExitStack() as stack:
        if tracker is None:
            tracker = stack.enter_context(opened(options.out, options, {name: 60.0}))
        yield tracker, stack.enter_context(tracker.stage(name, total))
