"""Sampling from a model: what the sampled distribution is, and the decode loop."""

from pt_jax.sampling.decode import Completions, sample
from pt_jax.sampling.distribution import Sampling, scored_logits, transform
from pt_jax.sampling.refill import sample_queue
from pt_jax.sampling.replay import score
from pt_jax.sampling.search import beam_search, best_of
from pt_jax.sampling.speculative import Draft, speculate
from pt_jax.sampling.streaming import sample_until, stream
from pt_jax.sampling.timings import Timings, timed

__all__ = [
    "Completions", "Draft", "Sampling", "Timings", "beam_search", "best_of", "sample", "sample_queue", "sample_until",
    "score", "scored_logits", "speculate", "stream", "timed", "transform",
]  # fmt: skip
