"""What the training commands share: options, and opening a model."""

import dataclasses
import math
from functools import partial
from typing import Any, Literal

import jax

from pt_jax import checks, models
from pt_jax.commands import adapters, evaluating, inputs, keeping, optimizing, runs, several
from pt_jax.data import rows, tokenizers
from pt_jax.sampling import Sampling, sample, sample_queue
from pt_jax.training import sharding

AXES = ("fsdp", "tensor", "context", "expert")  # of the mesh; data takes the devices that are left


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """Options of every training command that name what it reads and writes.

    Args:
      model: folder of the model to start from: config.json, model.safetensors and tokenizer files; or a PEFT folder,
        whose adapter is folded into its base.
      data: .jsonl or .parquet file of rows.
      out: folder for the trained model and its metrics; until the model is there, OUT.unfinished has the metrics.
      overwrite: replace the folder at --out, if it holds a model; with --resume auto, unless it is this run's.
    """

    model: str
    data: str
    out: str
    overwrite: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(several.Several, keeping.Keeping, evaluating.Evaluating, optimizing.Optimizing, Files):
    """Options of every training command. In the help those of the bases come first, from the last to the first.

    Args:
      epochs: passes over the data.
      steps: updates; overrides epochs.
      microbatches: parts that a batch is worked through in, to save memory; changes no result.
      seed: of everything random: the order of the rows and what is sampled.
      fsdp: devices that the weights are split over.
      tensor: devices that heads, hidden units and the vocabulary are split over.
      context: devices that the tokens of each row are split over, for long rows.
      expert: devices that the experts of a mixture are split over.
      log_every: steps between two looks at the metrics; every step is logged.
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

    epochs: float = 1.0
    steps: int | None = None
    microbatches: int = 1
    seed: int = 0
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    expert: int = 1
    log_every: int = 10
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

    def reads(self) -> dict[str, str]:
        """What a run of these options reads: name of the option to the path."""
        return {name: path for name in inputs.READ if (path := getattr(self, name)) is not None}


@dataclasses.dataclass
class Model:
    """A model folder in memory, and how it is computed."""

    folder: str
    params: dict | None
    config: models.Config
    tokenizer: Any
    how: models.Execution = models.Execution()  # noqa: RUF009, it does not change

    def give(self) -> dict:
        """The parameters, which are let go of here: whoever trains them is to be the only one who holds them."""
        params, self.params = self.params, None
        return params

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

    def sampler(self, length: int, how: Sampling, slots: int | None = None):
        """``sample``, or ``sample_queue`` with so many slots, with all bound but params, prompts, seen and key."""
        by_layer, by = jax.default_backend() == "gpu", sample if slots is None else partial(sample_queue, slots=slots)
        bound = models.bind(self.config, dataclasses.replace(self.how, cache_by_layer=by_layer))
        return partial(
            _by_layer(self.config, by) if by_layer else by, apply=bound.apply, init_cache=bound.init_cache,
            length=length, how=how, end_tokens=self.end_tokens, pad_token=self.pad_token,
        )  # fmt: skip

    def check_length(self, tokens, source: str, room: int = 0, limit: int | None = None) -> None:
        """Fails when a row, and ``room`` more tokens, do not fit the model (or a lower limit)."""
        limit = min(self.config.max_length, limit or self.config.max_length)
        if len(tokens) + room > limit:
            more = f" and {room} are to be sampled" if room else ""
            raise ValueError(f"{source}: has {len(tokens)} tokens{more}, the limit is {limit}; shorten it")


def _by_layer(config, sampler):
    """A sampler of stacked weights, which it takes apart: short runs on a CPU would only wait longer to compile."""
    by_layer = jax.jit(partial(models.by_layer, config))
    return lambda params, *given, **settings: sampler(by_layer(params), *given, **settings)


def open_to_train(options) -> Model:
    """The model that a training command starts from, each weight straight to the devices that will hold it."""
    place = partial(sharding.by_name, mesh=mesh_of(options))
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


def check_options(options: Training, kinds) -> tuple[list[dict], list[dict]]:
    """The rows to train on and those to evaluate on, after all checks that commands share and that need no model.

    Args:
      options: the command's.
      kinds: of rows that it can use.
    """
    counts = ("steps", "microbatches", *AXES, "log_every", "batch_size", "lora_rank", "lora_alpha")
    check_numbers(options, above_0=("epochs", *counts), seed=(0, SEEDS))
    optimizing.check(options)
    if options.batch_size % options.microbatches:
        raise ValueError(f"--microbatches {options.microbatches} does not divide --batch-size {options.batch_size}")
    keeping.check(options)
    evaluating.check(options)
    reads = {"--" + name.replace("_", "-"): path for name, path in options.reads().items()}
    runs.check_out(options.out, overwrite=options.overwrite, resume=options.resume, **adapters.inputs(options) | reads)
    adapters.check(options)
    held_out = [] if options.eval_data is None else rows.read(options.eval_data, kinds=kinds)
    return rows.read(options.data, kinds=kinds), held_out
