"""A linear loss to watch a train step by."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pt_jax import weights
from pt_jax.training import init_state, make_train_step

SGD = optax.sgd(0.3)


def linear(params, frozen, batch, key):
    """A loss to watch the step by: its metrics say what it was given."""
    x = jnp.einsum("bd,d->b", batch["x"], params["w"])
    metrics = {
        "row": batch["x"][:, 0],
        "rows": batch["x"],
        "sum": batch["x"].sum(),
        "count": jnp.int32(len(batch["x"])),
        "noise": jax.random.uniform(key, x.shape),
    }
    return weights.weighted_sum(x - frozen, batch["weights"]), metrics


@functools.cache
def linear_step(microbatches):
    return make_train_step(linear, SGD, microbatches=microbatches)


def linear_batch(rows=8):
    x = np.random.default_rng(0).normal(size=(rows, 3)).astype(np.float32)
    return {"x": x, "weights": np.full(rows, 1 / rows, np.float32)}


def linear_state(optimizer=SGD, seed=0):
    return init_state({"w": jnp.ones(3)}, optimizer, jax.random.key(seed))
