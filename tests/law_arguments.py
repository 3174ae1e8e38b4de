"""What the argument names of the mathematics stand for: ``test_laws`` makes its arrays from these tables.

One name, one meaning, throughout ``losses``, ``objectives``, ``divergences`` and ``advantages``. A function with a
``mask`` speaks of tokens, [B, T]; one with neither ``mask`` nor [P, G] rewards speaks of rows, [B]. Axes are named
as in the docstrings; for the names in EITHER they are [B, T] beside a ``mask`` and [B] without one.
"""

import inspect

import numpy as np
import pytest

LENGTHS = np.array([6, 3, 0, 5, 1, 4, 6, 2])  # B = 8 rows, T = 6; one row is empty; no two halves are alike
COLUMNS, VOCAB = 6, 7

# name -> axes
AXES = {
    "mask": "B T",
    # nats
    "chosen": "B", "rejected": "B", "ref_chosen": "B", "ref_rejected": "B",
    # of policy objectives, a token
    "advantages": "B T",
    # a row of logits speaks of the token after it
    "logits": "B T V", "ref_logits": "B T V", "teacher_logits": "B T V",
    # of groups; NaN where there is no verdict
    "rewards": "P G",
}  # fmt: skip
EITHER = {"logps", "old_logps", "ref_logps", "teacher_logps", "sampling_logps"}

NATS = EITHER | {"chosen", "rejected", "ref_chosen", "ref_rejected"}
POSITIVE = {"entropies"}
LENGTH = {"chosen_length", "rejected_length"}  # whole numbers from 1, as floats
YES_NO = {"mask"}

# Functions that look at the whole batch at once, and say so, as "module.function": why. The laws of microbatches and of
# padded rows are not theirs.
WHOLE_BATCH: dict[str, str] = {}


def axes(fn, name) -> str:
    """``"B T"`` and the like; fails for a name that nobody explained."""
    masked = "mask" in inspect.signature(fn).parameters
    if name in EITHER:
        return "B T" if masked else "B"
    if name not in AXES:
        pytest.fail(f"{fn.__module__}.{fn.__name__}: say in {__name__} what {name!r} stands for")
    return "B T" if name == "rewards" and masked else AXES[name]


def positional(fn):
    parameters = inspect.signature(fn).parameters
    return [name for name, p in parameters.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY]


def of_groups(fn):
    return any(axes(fn, name) == "P G" for name in positional(fn))


def real_slots(mask, axes):
    """Which slots of an argument exist, given the scored tokens [B, T]; None for what has no padding."""
    if axes == "B T V":  # row t of logits speaks of token t + 1
        return np.pad(mask[:, 1:], ((0, 0), (0, 1)))[..., None] & np.ones(VOCAB, bool)
    return {"B T": mask, "P G": mask, "B": mask.any(1), "": None}[axes]


def arguments(fn, seed=0):
    """Arrays for a function, by name, and the scored tokens [B, T] (or judged answers [P, G])."""
    rng = np.random.default_rng(seed)
    mask = np.arange(COLUMNS) < np.roll(LENGTHS, seed)[:, None]
    mask[-2, 2] = False  # a hole: the answer of a tool
    if not of_groups(fn):
        mask[:, 0] = False  # the first token is predicted by nothing
    base = {"B T": -rng.uniform(1.5, 6.0, mask.shape), "B": -rng.uniform(1.5, 6.0, len(mask))}
    sizes = {"B": len(mask), "T": COLUMNS, "V": VOCAB, "P": len(mask), "G": COLUMNS}
    kwargs = {}
    for name in positional(fn):
        letters = axes(fn, name)
        shape = tuple(sizes[x] for x in letters.split())
        if name == "mask":
            kwargs[name] = mask
        elif name in YES_NO:
            kwargs[name] = rng.random(shape) < 0.6
        elif name in LENGTH:
            kwargs[name] = rng.integers(1, 9, shape).astype(np.float32)
        elif name in NATS:  # apart by ratios in [0.3, 3]
            kwargs[name] = (base[letters] + rng.uniform(np.log(0.3), np.log(3), shape)).astype(np.float32)
        elif letters == "P G":
            kwargs[name] = np.where(mask, rng.choice([0.0, 0.35, 0.4, 1.0, -0.7], shape), np.nan).astype(np.float32)
        else:
            x = rng.normal(size=shape)
            kwargs[name] = (np.abs(x) if name in POSITIVE else x).astype(np.float32)
    return kwargs, mask
