"""pt_jax: post-training of language models in pure JAX.

An algorithm is a function here: read it, call it, differentiate it, vmap it, test it. The rooms, from the ground up:
``weights``, ``logps``, ``divergences``, ``advantages``, ``losses``, ``objectives``, ``models``, ``data``, ``rewards``,
``sampling``, ``training``, ``recipes``, ``tracking``. ``pt_jax.load`` and ``pt_jax.save`` read and write Hugging Face
folders.
"""

import importlib

_ROOMS = (
    "advantages", "checks", "data", "divergences", "logps", "losses", "models", "objectives", "recipes", "rewards",
    "sampling", "tracking", "training", "weights",
)  # fmt: skip
_MODELS = ("load", "save")

__all__ = [*_ROOMS, *_MODELS]
__version__ = "0.1.0"


def __getattr__(name):
    """Imports a room when it is first named, so that ``import pt_jax`` costs next to nothing."""
    if name in _ROOMS:
        return importlib.import_module(f"pt_jax.{name}")
    if name in _MODELS:
        return getattr(importlib.import_module("pt_jax.models"), name)
    raise AttributeError(f"module 'pt_jax' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
