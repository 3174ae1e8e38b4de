"""Decoder language models as functions over a dict of arrays, and their Hugging Face folders."""

from pt_jax.models.config import Config, Execution
from pt_jax.models.decoder import apply, bind, forward, init_cache
from pt_jax.models.huggingface import load, save
from pt_jax.models.parameters import init

__all__ = ["Config", "Execution", "apply", "bind", "forward", "init", "init_cache", "load", "save"]
