"""Our values for a case that TRL's own code was recorded on.

``replay(entry, arrays)`` reads nothing but the entry's family, options and inputs: a case that nobody saw when this was
written is computed like any other, and one with an option that is not known here is refused.
"""

import importlib
import pathlib
import sys

import numpy as np

if str(pathlib.Path(__file__).parent) not in sys.path:  # for those who load this file by its path
    sys.path.insert(0, str(pathlib.Path(__file__).parent))

# family -> the module of ``replays`` that has a function of this name
FAMILIES = {
    "preference": ["dpo", "online_dpo", "a2po", "xpo", "nash_md"],
    "unpaired": ["cpo", "orpo", "tpo", "kto", "bco", "reward"],
    "advantage": ["grpo_advantage", "rloo_advantage", "ppo"],
    "policy": ["grpo", "gmpo", "gspo_token", "rloo"],
    "distillation": ["gkd", "gold", "distillation", "self_distillation", "iw_opd", "minillm"],
    "likelihood": ["sft", "kernel"],
}
MODULE = {family: module for module, families in FAMILIES.items() for family in families}


class Options(dict):
    """The options of an entry; those that nobody read are an error, because they would have changed the value."""

    def __init__(self, options):
        super().__init__(options)
        self.unread = set(options)

    def __getitem__(self, name):
        self.unread.discard(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.unread.discard(name)
        return super().get(name, default)


def replay(entry, arrays) -> dict[str, np.ndarray]:
    """Computes an entry with this package's functions.

    Args:
      entry: of ``reference/trl_1_16.json``, or another of its form; family, options, inputs and outputs are read.
      arrays: key -> array, such as the npz beside it.

    Returns:
      Output name -> value.

    Raises:
      ValueError: a family, an option or the value of one is not known.
    """
    family = entry["family"]
    if family not in MODULE:
        raise ValueError(f"family {family!r} is not known")
    options = Options(entry["options"])
    inputs = {name: np.asarray(arrays[key]) for name, key in entry["inputs"].items()}
    compute = getattr(importlib.import_module(f"replays.{MODULE[family]}"), family)
    out = compute(options, inputs, set(entry["outputs"]))
    if options.unread:
        raise ValueError(f"family {family!r} does not know the options {sorted(options.unread)}")
    return {name: np.asarray(out[name]) for name in entry["outputs"]}


def one_of(options, name, known):
    """The option, which must be one of ``known``."""
    value = options[name]
    if value not in known:
        raise ValueError(f"{name} is {value!r}, known are {sorted(map(str, known))}")
    return value


def ignore(options, *names):
    """Options that cannot change these outputs; say why where this is called."""
    for name in names:
        options.unread.discard(name)
