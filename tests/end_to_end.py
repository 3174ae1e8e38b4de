"""Whole training runs of TRL's trainers, done again with this package's recipes.

``replay_run(entry, arrays)`` reads nothing but the entry's trainer, options and rows (and, where it says nothing of the
number of steps, the length of its log): a run that nobody saw when this was written is done like any other, and one
with an option that is not known here is refused. One module a trainer, ``replays.*_trainer``, says what a step's batch
is and what is lost on it; the model, the optimiser and the loop are the same for all and stand here.

The weights come in and go out as a Hugging Face folder, so reading and writing these is part of what is compared.
"""

import importlib
import json
import math
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

HERE = pathlib.Path(__file__).parent
if str(HERE) not in sys.path:  # for those who load this file by its path
    sys.path.insert(0, str(HERE))

from oracle import Options, ignore, one_of  # noqa: E402

import pt_jax  # noqa: E402
from pt_jax import models  # noqa: E402
from pt_jax.losses import preference  # noqa: E402
from pt_jax.training import optimizers  # noqa: E402
from pt_jax.training.step import init_state, make_train_step  # noqa: E402

TRAINERS = {"SFTTrainer": "sft_trainer", "DPOTrainer": "dpo_trainer", "GRPOTrainer": "grpo_trainer"}

# what the entries call it -> what TRL calls it
NAMES = {
    "batch": "per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "accumulation": "gradient_accumulation_steps",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "group": "num_generations",
    "lr": "learning_rate",
    "schedule": "lr_scheduler_type",
}
# of the entry itself: who it is, and what came out
SAYS_NOTHING = {"name", "note", "notes", "description", "trl_version", "trl_code", "log", "final", "outputs", "metrics"}
# options of TRL that change nothing on one CPU with the rows in the order given and the completions fixed
NO_EFFECT = (
    "seed", "data_seed", "output_dir", "report_to", "save_strategy", "use_cpu", "disable_tqdm", "disable_dropout",
    "gradient_checkpointing", "remove_unused_columns", "dataloader_num_workers", "dataloader_pin_memory",
    "pad_to_multiple_of", "padding_free", "dataset_kwargs", "dataset_num_proc", "precompute_ref_log_probs",
    "precompute_ref_batch_size", "log_completions", "average_tokens_across_devices",
)  # fmt: skip
# options that are done here only when off: they need the order of torch's random numbers, or another arithmetic
OFF = (
    "shuffle_dataset", "group_by_length", "bf16", "fp16", "tf32", "packing", "use_vllm", "label_smoothing_factor",
    "neftune_noise_alpha", "use_adaptive_entropy", "use_liger_kernel", "activation_offloading",
)  # fmt: skip


class Model(NamedTuple):
    """A model as the recipes take it."""

    params: dict
    config: models.Config
    apply: Callable  # (params, tokens, seen) -> (logits, cache)
    pad_token: int
    end_tokens: tuple


class Run(NamedTuple):
    """What a trainer does: its loss, how many updates, and what it is fed.

    ``feed(step, params, ref_params)`` gives the batch of an update, in how many microbatches it was accumulated, and
    what is known of it without the model.
    """

    loss: Callable
    steps: int
    feed: Callable
    sync: tuple | None = None  # (every so many steps, share of the policy) by which the reference follows


def replay_run(entry, arrays) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Trains as TRL did.

    Args:
      entry: of ``reference/trl_end_to_end.json``, or another of its form. Options stand beside the rows or under
        "options"; "config" and "optimizer" are those of the reference unless the entry has its own.
      arrays: key -> array, such as the npz beside it; the weights of the start are under "weights/".

    Returns:
      The log, one dict an update with ``loss``, ``grad_norm`` (before the clip) and the metrics under TRL's names; and
      the weights after the last update, under their names in a Hugging Face file.

    Raises:
      ValueError: a trainer, an option or the value of one is not known.
    """
    options = _options(entry)
    module = TRAINERS[one_of(options, "trainer", TRAINERS)]
    ignore(options, *NO_EFFECT)
    for name in OFF:
        one_of({name: options.get(name) or False}, name, {False})
    one_of({"logging_steps": options.get("logging_steps", 1)}, "logging_steps", {1})
    model = read_model(_of_reference(entry, "config"), arrays)
    steps_of_log = len(entry.get("log") or [])
    run = importlib.import_module(f"replays.{module}").run(options, model, steps_of_log)
    optimizer = _optimizer(options, _of_reference(entry, "optimizer"), run.steps)
    if options.unread:
        raise ValueError(f"{entry['trainer']} does not know the options {sorted(options.unread)}")

    state, ref_params, log = init_state(model.params, optimizer, jax.random.key(0)), model.params, []
    compiled = {}
    for step in range(run.steps):
        batch, microbatches, known = run.feed(step, state.params, ref_params)
        if microbatches not in compiled:
            compiled[microbatches] = make_train_step(run.loss, optimizer, microbatches=microbatches)
        state, metrics = compiled[microbatches](state, {}, batch)
        log.append({name: float(x) for name, x in jax.device_get(metrics).items() if not np.ndim(x)} | known)
        if run.sync and (step + 1) % run.sync[0] == 0:
            ref_params = preference.soft_update(state.params, ref_params, alpha=run.sync[1])
    return log, write_weights(model.config, state.params)


# ---- the entry


def _options(entry) -> Options:
    """All that an entry says about how to train, under TRL's names."""
    said = {}
    inner = entry.get("options") or {}
    outer = {name: x for name, x in entry.items() if name not in {"options", "config", "optimizer"} | SAYS_NOTHING}
    for name, value in [*outer.items(), *inner.items()]:
        name = NAMES.get(name, name)
        if name in said and said[name] != value:
            raise ValueError(f"{name} is said twice: {said[name]!r} and {value!r}")
        said[name] = value
    return Options(said)


def _of_reference(entry, name) -> dict:
    return entry.get(name) or json.loads((HERE / "reference" / "trl_end_to_end.json").read_text())[name]


def value_of(options, name, default, kind=float):
    """An option as a number; ``default`` where it is absent or null."""
    value = options.get(name)
    return default if value is None else kind(value)


def number_of_steps(options, an_epoch, steps_of_log) -> int:
    """Updates: what the options say, else as many as were logged, else those of the epochs."""
    limit, epochs = value_of(options, "max_steps", -1, int), value_of(options, "num_train_epochs", 1)
    return limit if limit > 0 else steps_of_log or math.ceil(epochs * an_epoch)


def reference_follows(options):
    """``Run.sync`` of the options of trainers that have a reference."""
    share = value_of(options, "ref_model_mixup_alpha", 0.6)
    every = value_of(options, "ref_model_sync_steps", 512, int)
    return (every, share) if options.get("sync_ref_model") else None


def same(params, ref_params) -> bool:
    """Whether the policy still is the reference, to the last bit."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(ref_params), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


# ---- rows, in the microbatches of an update


def windows(count, options, steps_of_log):
    """The microbatches of every update, rows in their order: ``[[[row, ...], ...], ...]``.

    An epoch ends with what is left: a smaller microbatch, and an update of fewer of them.
    """
    order = options.get("order", "sequential")
    if order != "sequential" and not isinstance(order, list):
        raise ValueError(f"order is {order!r}; known are 'sequential' and a list of rows")
    rows = list(range(count)) if order == "sequential" else order
    size = value_of(options, "per_device_train_batch_size", 8, int)
    together = value_of(options, "gradient_accumulation_steps", 1, int)
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    if options.get("dataloader_drop_last") and len(parts[-1]) < size:
        parts = parts[:-1]
    epoch = [parts[i : i + together] for i in range(0, len(parts), together)]
    steps = number_of_steps(options, len(epoch), steps_of_log)
    return [epoch[i % len(epoch)] for i in range(steps)]


def dealt(microbatches):
    """Rows in the order in which ``make_train_step`` deals them; None fills a short microbatch."""
    longest = max(map(len, microbatches))
    return [part[j] if j < len(part) else None for j in range(longest) for part in microbatches]


def a_microbatch(weigh, microbatches):
    """``weigh`` of each microbatch alone, and the mean of all: what TRL does where we take the batch as a whole."""

    def over_all(mask):
        parts = mask.reshape(-1, microbatches, *mask.shape[1:]).swapaxes(0, 1)
        parts = jax.vmap(weigh)(jnp.asarray(parts)) / microbatches
        return np.asarray(parts.swapaxes(0, 1).reshape(mask.shape))

    return over_all


# ---- the model


def read_model(config, arrays) -> Model:
    """The tree of a Hugging Face config and the tensors under "weights/", read from a folder of them."""
    from safetensors.numpy import save_file

    with tempfile.TemporaryDirectory() as folder:
        names = [name for name in arrays if name.startswith("weights/")]
        tensors = {name.removeprefix("weights/"): np.ascontiguousarray(arrays[name]) for name in names}
        save_file(tensors, pathlib.Path(folder) / "model.safetensors", metadata={"format": "pt"})
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(config))
        params, ours = pt_jax.load(folder)
    ends = config.get("eos_token_id")
    ends = () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)
    return Model(params, ours, models.bind(ours).apply, config.get("pad_token_id") or 0, ends)


def write_weights(config, params) -> dict[str, np.ndarray]:
    """The tensors of a folder that ``pt_jax.save`` writes."""
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory() as folder:
        pt_jax.save(pathlib.Path(folder) / "model", params, config)
        return load_file(pathlib.Path(folder) / "model" / "model.safetensors")


# ---- the optimiser


def _optimizer(options, default, steps):
    """torch's AdamW under transformers' schedules, with the gradient clipped by its norm."""
    if "optim" in options:
        one_of(options, "optim", {"adamw_torch", "adamw_torch_fused"})
    b1 = value_of(options, "adam_beta1", default["betas"][0])
    b2 = value_of(options, "adam_beta2", default["betas"][1])
    eps = value_of(options, "adam_epsilon", default["eps"])
    peak = value_of(options, "learning_rate", default["lr"])
    decay = value_of(options, "weight_decay", default["weight_decay"])
    clip = value_of(options, "max_grad_norm", default["max_grad_norm"])
    kind = one_of(
        {"lr_scheduler_type": options.get("lr_scheduler_type", default["schedule"])}, "lr_scheduler_type", SCHEDULES
    )
    warmup = _warmup(options, steps)
    if kind == "constant" and (b1, eps) == (0.9, 1e-8) and clip > 0:
        return optimizers.adamw(peak, weight_decay=decay, clip=clip, b2=b2)

    def rate(done):
        rising = done / max(1, warmup)
        falling = SCHEDULES[kind]((done - warmup) / max(1, steps - warmup))
        return peak * (falling if kind == "constant" else jnp.where(done < warmup, rising, falling))

    is_norm = lambda path: jax.tree_util.keystr(path[-1:], simple=True).endswith(("norm", "bias"))
    decayed = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: not is_norm(path), params)
    adamw = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(clip), adamw) if clip > 0 else adamw


# share of the steps after the warm-up -> share of the highest rate
SCHEDULES = {
    "constant": lambda share: 1.0 + 0.0 * share,
    "constant_with_warmup": lambda share: 1.0 + 0.0 * share,
    "linear": lambda share: jnp.maximum(0.0, 1 - share),
    "cosine": lambda share: jnp.maximum(0.0, 0.5 * (1 + jnp.cos(jnp.pi * share))),
}


def _warmup(options, steps) -> int:
    """Steps; a number below 1 is a share of all, as transformers has it."""
    number = value_of(options, "warmup_steps", 0.0) or value_of(options, "warmup_ratio", 0.0)
    return int(number) if number >= 1 else math.ceil(steps * number)
