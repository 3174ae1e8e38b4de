"""Decoder language models as functions over a dict of arrays, and their Hugging Face folders."""

from pt_jax.models.config import Config
from pt_jax.models.decoder import apply, bind, init, init_cache
from pt_jax.models.huggingface import load, save

__all__ = ["Config", "apply", "bind", "init", "init_cache", "load", "save"]
