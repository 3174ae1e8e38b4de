"""Sampling from a model: what the sampled distribution is, and the decode loop."""

from pt_jax.sampling.decode import Completions, sample
from pt_jax.sampling.distribution import Sampling, transform

__all__ = ["Completions", "Sampling", "sample", "transform"]
