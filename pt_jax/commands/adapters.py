"""Adapters on the command line: what the flags ask for, and folders that hold an adapter and name its base."""

import pathlib

import jax

from pt_jax import models
from pt_jax.models import huggingface, lora, peft

# which mean nothing without --lora-rank
FLAGS = ("lora_alpha", "lora_targets", "lora_plus", "dora", "rslora", "quantize", "fold")
QUANTIZED = {None: None, "int8": models.quantize.int8, "nf4": models.quantize.nf4}


def of(options) -> lora.Adapter | None:
    """The adapter that a training command's options ask for; None to train all weights."""
    if options.lora_rank is None:
        for name in FLAGS:
            if getattr(options, name) not in (None, False):
                raise ValueError(f"--{name.replace('_', '-')} is of adapters; give --lora-rank to train them")
        return None
    return lora.Adapter(
        options.lora_rank, lora.Adapter.alpha if options.lora_alpha is None else options.lora_alpha,
        options.lora_targets, options.rslora, options.dora,
    )  # fmt: skip


def check(options) -> None:
    """Fails with a sentence when the model at --model cannot have the adapters that are asked for."""
    how, config = of(options), read_config(options.model)
    if how is None:
        return
    lora.targeted(jax.eval_shape(lambda: models.init(config, jax.random.key(0))), how)
    if options.fold:
        return
    if peft.is_adapter(huggingface.local(options.model)):
        raise ValueError(
            f"--model {options.model} is an adapter already, and the folder of one names a model as its base; give "
            "--fold to write full weights, or leave out --lora-rank to train all weights"
        )
    peft.check(config, how)


def inputs(options) -> dict:
    """What a run reads at --model: name to path."""
    folder = pathlib.Path(options.model)
    base = {"the base of --model": peft.base(folder)} if peft.is_adapter(folder) else {}
    return {"--model": options.model} | base


def read_config(path) -> models.Config:
    """The config of a model folder, or of the base that an adapter's folder names."""
    folder = huggingface.local(path)
    return huggingface.read_config(huggingface.local(peft.base(folder)) if peft.is_adapter(folder) else folder)


def read(path, quantize=None, place=None):
    """The weights of a folder, with an adapter folded into its base.

    Args:
      path: of a model, or a PEFT folder.
      quantize: a name of ``QUANTIZED``.
      place: as of ``models.load``.

    Returns:
      params, config, and the folder whose tokenizer is theirs.
    """
    folder = huggingface.local(path)
    if not peft.is_adapter(folder):
        return *models.load(folder, place=place, quantize=QUANTIZED[quantize]), folder
    base = huggingface.local(peft.base(folder))
    params, config = models.load(base, place=place)
    adapters, how = peft.load(folder, config, params)
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    params = lora.fold(params, adapters, how)
    if quantize is not None:
        params = models.quantize.quantize(params, QUANTIZED[quantize])
    return params, config, folder if has_tokenizer else base


def base_name(path) -> str:
    """How an adapter's folder names its base: a local folder by its whole path, wherever it is read from."""
    folder = pathlib.Path(path)
    return str(folder.resolve()) if folder.is_dir() else str(path)


def folded(options, trained, base):
    """What was trained, as it is written: with --fold, all weights; else nothing looks at ``base``, the model's own."""
    return models.quantize.dequantize(lora.fold(base, trained, of(options))) if options.fold else trained


def write(folder, options, model, trained) -> None:
    """What was trained as a folder that others read.

    Args:
      folder: to write into.
      options: of the run.
      model: that it started from, with its config and tokenizer.
      trained: of ``folded``: all weights, or adapters.
    """
    how = of(options)
    if how is None or options.fold:
        models.save(folder, trained, model.config, model.tokenizer)
    else:
        name = base_name(options.model)
        peft.save(folder, trained, model.config, how, base=name, tokenizer=model.tokenizer)
