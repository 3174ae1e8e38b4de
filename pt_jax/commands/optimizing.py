"""How a step is taken, on the command line: the optimiser, its rates, and what is done around each step."""

import dataclasses
import math
from typing import Literal

import optax

from pt_jax import checks
from pt_jax.training import averages, moments, optimizers, schedules, spikes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizing:
    """Options of every training command that say how a step is taken.

    Args:
      optimizer: what takes the steps; AdamW's rates and decays carry over to adafactor and muon, lion's rates are 3 to
        10 times lower.
      schedule: how the rate falls after its rise: to 0 in a line or along a cosine, not at all, or over the last fifth
        of the steps (wsd).
      moments: type that the optimizer's large moments are kept in between two steps; 8 bits spare second moments, which
        are bfloat16 then.
      learning_rate: the highest rate.
      warmup: share of the steps over which the rate rises from 0.
      weight_decay: times the rate; norms and biases are not decayed.
      no_decay: what is not decayed instead, as patterns of its path: embed "layers.*norm".
      clip: largest global norm of the gradient.
      rates: other rates, as pairs of a pattern of a path and a factor: embed 0.1 "layers.*norm" 0.
      lora_plus: the adapters' second matrix (B) has a rate so many times as high (LoRA+), 16 or so.
      average: evaluate and write the exponential moving average of what is trained, with this decay, in the place of
        its last values.
      skip_spikes: skip steps whose loss or gradient is so many deviations above the mean of those before it, 6 or so.
      spike_window: steps that are looked back at for it; none is skipped before there are so many; 128 when not given.
    """

    optimizer: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = "adamw"
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    moments: Literal["float32", "bfloat16", "8bit"] = "float32"
    learning_rate: float = 1e-4
    warmup: float = 0.1
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = ()
    clip: float = 1.0
    rates: tuple[tuple[str, float], ...] = ()
    lora_plus: float | None = None
    average: float | None = None
    skip_spikes: float | None = None
    spike_window: int | None = None


STORED = {"float32": lambda optimizer: optimizer, "bfloat16": moments.in_bfloat16, "8bit": moments.in_8_bits}
WINDOW = 128  # of spikes


def check(options: Optimizing) -> None:
    """Fails with a sentence when the options make no sense, or one of them would do nothing."""
    for name in ("learning_rate", "lora_plus", "average", "skip_spikes", "spike_window"):
        if (value := getattr(options, name)) is not None:
            flag = "--" + name.replace("_", "-")
            checks.positive(flag, value)
            checks.between(flag, value, 0.0, 1.0 if name == "average" else math.inf)
    checks.between("--warmup", options.warmup, 0.0, 1.0)
    checks.between("--weight-decay", options.weight_decay, 0.0, math.inf)
    checks.positive("--clip", options.clip)  # infinity does not clip
    patterns = [pattern for pattern, _ in options.rates]
    if twice := [pattern for pattern in dict.fromkeys(patterns) if patterns.count(pattern) > 1]:
        raise ValueError(f"--rates has {', '.join(twice)} more than once; give each pattern one factor")
    if options.no_decay and not options.weight_decay:
        raise ValueError(f"--no-decay {' '.join(options.no_decay)} is of --weight-decay, which is 0")
    if options.moments != "float32" and options.optimizer == "sgd":
        raise ValueError(f"--moments {options.moments} is of an optimizer that has moments; sgd has none")
    if options.spike_window is not None and options.skip_spikes is None:
        raise ValueError(f"--spike-window {options.spike_window} is of spikes; give --skip-spikes to skip them")


def check_updates(options: Optimizing, updates: int) -> None:
    """The same, once it is known how many updates there are."""
    window = options.spike_window or WINDOW
    if options.skip_spikes is not None and window >= updates:
        raise ValueError(
            f"--skip-spikes {options.skip_spikes:g} looks back at {window} updates, and the run has {updates}; "
            "give a shorter --spike-window"
        )


def optimizer_of(options: Optimizing, updates: int):
    """The optimiser that the options ask for."""
    rate = getattr(schedules, options.schedule)(options.learning_rate, updates, warmup=options.warmup)
    how = {"weight_decay": options.weight_decay, "clip": options.clip}
    if options.no_decay:
        how["decayed"] = optimizers.all_but(*options.no_decay)
    optimizer = getattr(optimizers, options.optimizer)(rate, **how)
    for factors in (dict(options.rates), {} if options.lora_plus is None else {"*.b": options.lora_plus}):
        if factors:
            optimizer = optax.chain(optimizer, optimizers.scale_by_path(factors))
    return STORED[options.moments](optimizer)


def begins_with(options: Optimizing, params) -> dict:
    """For ``init_state``: what the state has beside the parameters and the optimiser's own."""
    out = {} if options.average is None else {"averages": params}
    if options.skip_spikes is not None:
        out["extra"] = {"spikes": spikes.history(options.spike_window or WINDOW)}
    return out


def around(options: Optimizing) -> dict:
    """For ``make_train_step``: what is done after a step, and which are skipped."""
    out = {"after": [] if options.average is None else [averages.ema(options.average)]}
    if options.skip_spikes is not None:
        out["skip_when"] = spikes.far_above(options.skip_spikes)
        out["after"].append(spikes.remember)
    return out
