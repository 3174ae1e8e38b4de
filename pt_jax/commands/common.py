"""What the training commands share: options, and opening a model."""

import dataclasses
import math
from functools import partial
from typing import Any, Literal

import jax

from pt_jax import checks, models
from pt_jax.commands import adapters, keeping, runs, several
from pt_jax.data import rows, tokenizers
from pt_jax.sampling import Sampling, sample
from pt_jax.training import moments, optimizers, schedules, sharding

AXES = ("fsdp", "tensor", "context", "expert")  # of the mesh; data takes the devices that are left


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(keeping.Keeping, several.Several):
    """Options of every training command.

    Args:
      model: folder of the model to start from: config.json, model.safetensors and tokenizer files; or a PEFT folder,
        whose adapter is folded into its base.
      data: .jsonl or .parquet file of rows.
      out: folder for the trained model and its metrics; until the model is there, OUT.unfinished has the metrics.
      epochs: passes over the data.
      steps: updates; overrides epochs.
      microbatches: parts that a batch is worked through in, to save memory; changes no result.
      optimizer: what takes the steps; AdamW's rates and decays carry over to adafactor and muon, lion's rates are 3 to
        10 times lower.
      schedule: how the rate falls after its rise: to 0 in a line or along a cosine, not at all, or over the last fifth
        of the steps (wsd).
      moments: type that the optimizer's large moments are kept in between two steps; 8 bits spare second moments, which
        are bfloat16 then.
      learning_rate: the highest rate.
      warmup: share of the steps over which the rate rises from 0.
      weight_decay: times the rate; norms are not decayed.
      clip: largest global norm of the gradient.
      seed: of everything random: the order of the rows and what is sampled.
      fsdp: devices that the weights are split over.
      tensor: devices that heads, hidden units and the vocabulary are split over.
      context: devices that the tokens of each row are split over, for long rows.
      expert: devices that the experts of a mixture are split over.
      log_every: steps between two looks at the metrics; every step is logged.
      overwrite: replace the folder at --out, if it holds a model.
      remat: what is kept of the forward pass for the backward pass: all of it, each layer's input, or results of matrix
        products. The rest is computed again, to save memory; changes no result.
      dtype: that the model computes in; float32 when not given. What is trained is float32.
      lora_rank: train adapters of this rank beside the model's own weights, which stay as they are, and write a PEFT
        folder; all weights are trained when not given.
      lora_alpha: the adapters' scale is alpha / rank; 32 when not given.
      lora_targets: products that get adapters, as patterns: wq, w[qv], down, expert_*. When not given, all of attention
        and of feed-forward networks; in a model with experts, of attention alone.
      dora: train the norms of the adapted weights apart (DoRA).
      rslora: scale by alpha / sqrt(rank) instead (rsLoRA).
      quantize: keep the frozen weights of the layers in 8 bits or in 4 (QLoRA) to save memory.
      fold: write full weights with the adapters folded in, instead of a PEFT folder.
    """

    model: str
    data: str
    out: str
    epochs: float = 1.0
    steps: int | None = None
    microbatches: int = 1
    optimizer: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = "adamw"
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    moments: Literal["float32", "bfloat16", "8bit"] = "float32"
    learning_rate: float = 1e-4
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    expert: int = 1
    log_every: int = 10
    overwrite: bool = False
    remat: Literal["none", "layer", "dots"] = "none"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] | None = None
    dora: bool = False
    rslora: bool = False
    quantize: Literal["int8", "nf4"] | None = None
    fold: bool = False

    @property
    def execution(self) -> models.Execution:
        """How the model is computed."""
        return models.Execution(remat=self.remat, dtype=self.dtype)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model folder in memory, and how it is computed."""

    folder: str
    params: dict
    config: models.Config
    tokenizer: Any
    how: models.Execution = models.Execution()  # noqa: RUF009, it does not change

    @property
    def apply(self):
        return models.bind(self.config, self.how).apply

    @property
    def init_cache(self):
        return models.bind(self.config, self.how).init_cache

    @property
    def pad_token(self) -> int:
        return tokenizers.pad_id(self.tokenizer)

    @property
    def end_tokens(self) -> tuple[int, ...]:
        return tuple(sorted({*self.config.end_tokens, self.tokenizer.eos_token_id}))

    def sampler(self, length: int, how: Sampling):
        """``sample`` with all bound but params, prompts, seen and key."""
        return partial(
            _sample_by_layer(self.config) if jax.default_backend() == "gpu" else sample, apply=self.apply,
            init_cache=self.init_cache, length=length, how=how, end_tokens=self.end_tokens, pad_token=self.pad_token,
        )  # fmt: skip

    def check_length(self, tokens, source: str, room: int = 0, limit: int | None = None) -> None:
        """Fails when a row, and ``room`` more tokens, do not fit the model (or a lower limit)."""
        limit = min(self.config.max_length, limit or self.config.max_length)
        if len(tokens) + room > limit:
            more = f" and {room} are to be sampled" if room else ""
            raise ValueError(f"{source}: has {len(tokens)} tokens{more}, the limit is {limit}; shorten it")


def _sample_by_layer(config):
    """``sample`` of stacked weights, which it takes apart: short runs on a CPU would only wait longer to compile."""
    by_layer = jax.jit(partial(models.by_layer, config))
    return lambda params, *given, **settings: sample(by_layer(params), *given, **settings)


def open_to_train(options) -> Model:
    """The model that a training command starts from, each weight straight to the devices that will hold it."""
    place = partial(sharding.by_name, mesh=mesh_of(options)) if jax.process_count() == 1 else None
    return open_model(options.model, options.quantize, options.execution, place)


def mesh_of(options):
    """The mesh that a training command asks for; it is the same object for the same axes."""
    axes, devices = {name: getattr(options, name) for name in AXES}, jax.device_count()
    if devices % math.prod(axes.values()):
        given = " x ".join(f"--{name} {n}" for name, n in axes.items() if n > 1)
        raise ValueError(f"{given} does not divide {devices} devices")
    return sharding.make_mesh(**axes)


def open_model(folder, quantize=None, how=models.Execution(), place=None) -> Model:  # noqa: B008, it does not change
    """Reads a model folder with its tokenizer; of a PEFT folder, its base with the adapter folded in."""
    params, config, at = adapters.read(folder, quantize, place)
    tokenizer = tokenizers.load(at)
    models.vocabulary.check(tokenizer, config, folder)
    return Model(str(folder), params, config, tokenizer, how)


SEEDS = 2**32  # how many there are: what both numpy and jax can take


def check_numbers(options, *, above_0=(), at_least_0=(), **ranges) -> None:
    """Fails with a sentence when an option is out of its range; one that is not given (None) is not looked at.

    Args:
      options: a record of options.
      above_0: names of options that must be above 0.
      at_least_0: those that may be 0.
      **ranges: name to (low, high): low <= option < high.
    """
    ranges |= dict.fromkeys((*above_0, *at_least_0), (0.0, math.inf))
    for name, bounds in ranges.items():
        value, flag = getattr(options, name), "--" + name.replace("_", "-")
        if value is not None:
            if name in above_0:
                checks.positive(flag, value)
            checks.between(flag, value, *bounds)


def check_options(options: Training, kinds, **inputs) -> list[dict]:
    """The rows to train on, after everything that all commands can check without loading the model.

    Args:
      options: the command's.
      kinds: of rows that it can use.
      **inputs: more files that it reads, option to path.
    """
    counts = ("steps", "microbatches", *AXES, "log_every", "batch_size", "lora_rank", "lora_alpha")
    check_numbers(
        options, above_0=("epochs", "learning_rate", *counts), at_least_0=("weight_decay",), warmup=(0.0, 1.0),
        seed=(0, SEEDS),
    )  # fmt: skip
    checks.positive("--clip", options.clip)  # infinity does not clip
    if options.batch_size % options.microbatches:
        raise ValueError(f"--microbatches {options.microbatches} does not divide --batch-size {options.batch_size}")
    keeping.check(options)
    inputs = adapters.inputs(options) | {"--data": options.data} | inputs
    runs.check_out(options.out, overwrite=options.overwrite, resume=options.resume, **inputs)
    adapters.check(options)
    return rows.read(options.data, kinds=kinds)


STORED = {"float32": lambda optimizer: optimizer, "bfloat16": moments.in_bfloat16, "8bit": moments.in_8_bits}


def optimizer_of(options: Training, steps: int):
    """The optimiser that the options ask for."""
    rate = getattr(schedules, options.schedule)(options.learning_rate, steps, warmup=options.warmup)
    optimizer = getattr(optimizers, options.optimizer)(rate, weight_decay=options.weight_decay, clip=options.clip)
    return STORED[options.moments](optimizer)
