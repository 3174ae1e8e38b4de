"""How a run is kept and gone on with: its checkpoints, what may differ when it goes on, when it stops."""

import dataclasses
import json
import math
from typing import Literal

import jax
import numpy as np

from pt_jax import checks, signals
from pt_jax.commands import evaluating, inputs, runs, several
from pt_jax.tracking import sinks
from pt_jax.training import checkpoints, distributed, loop, specs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keeping:
    """Options of every training command that say how its run is kept, gone on with, watched and stopped.

    Args:
      checkpoint_every: steps between two checkpoints of everything that the run depends on, in OUT.unfinished, and in
        OUT once the model is there. SIGTERM and Ctrl-C write one too, and exit with 75: start me again with --resume.
      keep: newest checkpoints that are kept.
      keep_every: keep those of every so many steps as well.
      keep_best: keep the one where this metric was best as well: lowest if its name ends in loss, else highest.
      resume: "auto" goes on from the newest whole checkpoint, if there is one, and does nothing where the run's model
        is at --out already. A number goes on from that step's, and removes the later ones at once. The run is then the
        one that was never stopped, to the last bit.
      on_save_error: when a checkpoint cannot be written: "warn" and go on, or "stop".
      bad_steps: steps in a row that were skipped, for a loss or gradient that is not finite or by --skip-spikes, after
        which to give up; the batch is left in OUT.unfinished.
      max_minutes: stop as a signal would, so long after the start of the command.
      profile: record the steps from the first of these numbers to the second for TensorBoard and Perfetto.
      capture: updates (from 0) of which everything is put into the folder steps, for pt-jax replay.
      track: logs to write beside metrics.jsonl.
    """

    checkpoint_every: int | None = None
    keep: int = 3
    keep_every: int | None = None
    keep_best: str | None = None
    resume: str = "never"
    on_save_error: Literal["warn", "stop"] = "warn"
    bad_steps: int = 3
    max_minutes: float | None = None
    profile: tuple[int, int] | None = None
    capture: tuple[int, ...] = ()
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()


# What a run may change when it goes on: no result of these, or no more than the rounding of float32
MAY_CHANGE = (
    "out", "overwrite", "log_every", "microbatches", "fsdp", "tensor", "context", "expert", "remat",
    *(field.name for field in dataclasses.fields(Keeping)), *several.OWN,
)  # fmt: skip


def check(options: Keeping) -> None:
    """Fails with a sentence when the options of keeping make no sense."""
    for name in ("checkpoint_every", "keep", "keep_every", "bad_steps", "max_minutes"):
        if getattr(options, name) is not None:
            checks.positive("--" + name.replace("_", "-"), getattr(options, name))
    if options.resume not in ("auto", "never") and not options.resume.isdecimal():
        raise ValueError(f"--resume {options.resume}: must be auto, never, or the step of a checkpoint")
    if options.profile is not None and not 2 <= options.profile[0] <= options.profile[1]:
        first, last = options.profile
        raise ValueError(f"--profile {first} {last}: needs 2 <= first <= last; the first step compiles")
    for name in ("keep_best", "keep_every"):
        if (value := getattr(options, name)) is not None and options.checkpoint_every is None:
            raise ValueError(f"--{name.replace('_', '-')} {value} is of checkpoints; give --checkpoint-every")
    if options.capture and jax.process_count() > 1:
        raise ValueError("--capture: puts down whole arrays, of which each process has a part; do it in one process")
    sinks.check(options.track)


def opened(options: Keeping, warn) -> checkpoints.Checkpoints:
    """The checkpoints of a run."""
    return checkpoints.Checkpoints(
        runs.unfinished(options.out) / "checkpoints", keep=options.keep, every=options.keep_every,
        best=options.keep_best and best_of(options.keep_best), failed=warn if options.on_save_error == "warn" else None,
        warn=warn,
    )  # fmt: skip


def best_of(name: str):
    """For ``Checkpoints``: how good the metrics of a checkpoint are; worst where this one was not measured."""
    sign = -1 if evaluating.best(name) is min else 1
    return lambda metrics: -math.inf if math.isnan(value := metrics.get(name, math.nan)) else sign * value


def check_metric(options: Keeping, names) -> None:
    """Fails when the metric of --keep-best is none of those that a run has by the names."""
    if (name := options.keep_best) is not None and name not in names:
        raise ValueError(f"--keep-best {name}: the run has no such metric, but {', '.join(names)}")


def step_to_resume(options: Keeping, saved: checkpoints.Checkpoints) -> int | None:
    """The step whose checkpoint a run goes on from, whole and of the same options; None to begin anew."""
    if options.resume == "never":
        return None
    if options.resume == "auto":
        step = saved.newest()
    else:
        step = int(options.resume)
        if step not in (there := saved.steps()):
            raise ValueError(f"--resume {step}: {saved.folder} has {_numbers(there)}")
        checkpoints.check(saved.folder / str(step))
    if step is not None:
        check_options(saved.meta(step), options)
    return step


def _numbers(steps) -> str:
    return f"checkpoints of the steps {', '.join(map(str, steps))}" if steps else "no complete checkpoint"


def noted(options: Keeping) -> dict:
    """What is noted beside a run's state, so that it is gone on with as it was begun."""
    return _said(options) | {"inputs": inputs.noted(options)}


def _said(options) -> dict:
    return {"command": type(options).__name__.lower(), "options": json.loads(json.dumps(dataclasses.asdict(options)))}


def check_options(meta: dict, options: Keeping) -> None:
    """Fails with a sentence when a run would go on in another way than it was begun."""
    now, plain = _said(options), {field.name: field.default for field in dataclasses.fields(options)}
    if meta["command"] != now["command"]:
        raise ValueError(f"--resume: the checkpoint is of pt-jax {meta['command']}, this is pt-jax {now['command']}")
    for name, wanted in now["options"].items():
        value = meta["options"].get(name, plain[name])  # an option that did not exist then was not given
        if name not in (*MAY_CHANGE, *inputs.READ) and value != wanted:
            raise ValueError(
                f"--{name.replace('_', '-')} was {value} in the run that the checkpoint is of, and is {wanted} now; a "
                "run goes on as it was begun"
            )


def finished(options) -> bool:
    """Whether --resume auto finds that the run has come to its end: its model is at --out, and nothing is left to do.

    With --overwrite too: that replaces another run's model, and this one is what the run would make again. What a run
    that was killed in its very last moment has not put beside its model is put there.

    Raises:
      ValueError: the model is of a run with other options, or of other data, and is not to be replaced.
    """
    if getattr(options, "resume", "never") != "auto":
        return False
    if (meta := runs.finished(options.out)) is None:
        return False
    try:
        check_options(meta, options)
        inputs.check(meta, options)
    except ValueError as e:
        if options.overwrite:
            return False
        raise ValueError(f"--out {options.out} has the model of another run; give another folder ({e})") from e
    if several.writes() and runs.left_open(options.out):
        runs.close(options.out)
    return True


def stop(options: Keeping):
    """For ``loop.fit``: a signal, or the end of the time."""
    minutes, spent = options.max_minutes, signals.seconds()
    limit = () if minutes is None else (loop.time_limit(60 * minutes, spent=spent),)
    return distributed.agreed(loop.first_of(lambda step: signals.asked(), *limit))


def leave_batch(error, batch, fit) -> None:
    """Writes the batch that a run gave up at into its folder (arrays, rows of the data, texts); the error says where.

    Args:
      error: FloatingPointError of ``loop.fit``.
      batch: the arrays.
      fit: the run, a ``fitting.Fit``.
    """
    if jax.process_index():  # number 0 writes it
        return
    arrays = {name: np.asarray(x) for name, x in specs.flat(jax.device_get(batch)).items()}
    texts = {
        f"{name[: -len('tokens')]}texts": np.array(fit.model.tokenizer.batch_decode(x.tolist()))
        for name, x in arrays.items()
        if name.endswith("tokens")
    }
    file = runs.unfinished(fit.options.out) / f"bad_step_{error.step + 1}.npz"
    np.savez_compressed(file, rows=fit.rows_of_step(error.step), **arrays, **texts)
    error.args = (f"{error}; its batch is in {file}",)
