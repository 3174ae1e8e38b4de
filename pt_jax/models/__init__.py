"""Decoder language models as functions over a dict of arrays, and their Hugging Face folders."""

from pt_jax.models import heads, lora, peft, quantize, vocabulary
from pt_jax.models.cache import init_cache
from pt_jax.models.config import Config, Execution
from pt_jax.models.decoder import apply, bind, forward
from pt_jax.models.huggingface import load, save
from pt_jax.models.parameters import init
from pt_jax.models.runs import by_layer

__all__ = [
    "Config",
    "Execution",
    "apply",
    "bind",
    "by_layer",
    "forward",
    "heads",
    "init",
    "init_cache",
    "load",
    "lora",
    "peft",
    "quantize",
    "save",
    "vocabulary",
]
