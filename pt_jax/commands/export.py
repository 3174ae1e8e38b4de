"""``pt-jax export``: any checkpoint of a run as a Hugging Face folder."""

import dataclasses
import pathlib

import jax
import numpy as np
from tyro.conf import Positional

from pt_jax import folders
from pt_jax.commands import adapters, common, dpo, grpo, inputs, keeping, runs, sft
from pt_jax.models import lora
from pt_jax.training import checkpoints

COMMANDS = {"sft": sft.SFT, "dpo": dpo.DPO, "grpo": grpo.GRPO}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Writes the model of a checkpoint as a folder such as the run itself leaves at its end.

    Args:
      checkpoint: its folder, such as OUT.unfinished/checkpoints/100; or that of a run, for the newest whole one.
      out: folder for the model.
      best: of a run's checkpoints, the one where this metric was best (eval_loss): lowest if its name ends in loss,
        else highest.
      model: folder of the model that the run started from, where that is no longer where it was.
      fold: write full weights with the adapters folded in, instead of a PEFT folder.
      overwrite: replace the folder at --out, if it holds a model.
    """

    checkpoint: Positional[str]
    out: str
    best: str | None = None
    model: str | None = None
    fold: bool = False
    overwrite: bool = False


def run(options: Export) -> None:
    """Reads, checks and writes; of the checkpoint, only what was trained."""
    path = find(options.checkpoint, options.best)
    meta = checkpoints.read_meta(path)
    if meta.get("command") not in COMMANDS:
        raise ValueError(
            f"{path}: is not of pt-jax {', '.join(COMMANDS)}, so it does not say what its model is; read it with "
            "pt_jax.training.checkpoints.restore_part and write it with pt_jax.models.save"
        )
    print(f"Exports step {meta['step']} of pt-jax {meta['command']}: {path}")
    of_run = COMMANDS[meta["command"]](**_tuples(meta["options"]))
    if options.fold and of_run.lora_rank is None:
        raise ValueError(f"--fold: {path} is of a run that trained all weights")
    of_run = dataclasses.replace(
        of_run, model=options.model or of_run.model, out=options.out, fold=options.fold or of_run.fold
    )
    how = adapters.of(of_run)
    runs.check_out(options.out, overwrite=options.overwrite, resume="auto", checkpoint=options.checkpoint)
    inputs.check(meta, of_run, ("model",))
    model = common.open_model(of_run.model, of_run.quantize)
    shapes = jax.eval_shape(lambda p: p if how is None else lora.init(jax.random.key(0), p, how), model.params)
    master = lambda x: jax.ShapeDtypeStruct(x.shape, np.promote_types(x.dtype, np.float32))  # as ``init_state``
    part = "params" if of_run.average is None else "averages"  # as ``fitting.Fit.save``
    trained = checkpoints.restore_part(path, {part: jax.tree.map(master, shapes)})[part]
    with folders.appear_whole(options.out, overwrite=options.overwrite) as folder:
        adapters.write(folder, of_run, model, adapters.folded(of_run, trained, model.params))


def find(name: str, best: str | None = None) -> pathlib.Path:
    """The folder of one checkpoint, whose files are what was written: this one, or the newest or best of a run."""
    path = pathlib.Path(name).resolve()
    if (path / checkpoints.META).is_file():
        if best is not None:
            raise ValueError(f"--best {best}: {name} is one checkpoint; give the folder of a run")
        checkpoints.check(path)
        return path
    for folder in (path / "checkpoints", path, path.with_name(f"{path.name}.unfinished") / "checkpoints"):
        if steps := checkpoints.complete(folder):
            warn = lambda sentence: print(f"Warning: {sentence}")
            if best is None:
                return folder / str(checkpoints.Checkpoints(folder, warn=warn).newest())
            return folder / str(_best(folder, steps, best))
    raise ValueError(f"{name}: has no complete checkpoint; give the folder of one, or of a run that has some")


def _best(folder, steps, metric) -> int:
    """The step where a metric was best; of several the newest."""
    known = {step: checkpoints.read_meta(folder / str(step))["metrics"] for step in steps}
    found = {step: metrics[metric] for step, metrics in known.items() if metric in metrics}
    if not found:
        names = ", ".join(sorted({name for metrics in known.values() for name in metrics}))
        raise ValueError(f"--best {metric}: no checkpoint in {folder} has such a metric, but {names}")
    worth = keeping.best_of(metric)
    step = max(found, key=lambda step: (worth(known[step]), step))
    checkpoints.check(folder / str(step))
    return step


def _tuples(value):
    """What JSON has made lists of."""
    if isinstance(value, dict):
        return {name: _tuples(x) for name, x in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
