"""Sampling from a model: what the sampled distribution is, and the decode loop."""

from pt_jax.sampling.decode import Completions, sample
from pt_jax.sampling.distribution import Sampling, scored_logits, transform
from pt_jax.sampling.refill import sample_queue

__all__ = ["Completions", "Sampling", "sample", "sample_queue", "scored_logits", "transform"]
