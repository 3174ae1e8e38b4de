"""One training step for any loss."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from pt_jax import checks


@struct.dataclass
class TrainState:
    """Everything that a run's next step depends on, beside its data.

    Args:
      params: what is trained, and nothing else.
      opt_state: of the optimiser.
      step: int32 scalar, updates done.
      key: PRNG key of the run; step n uses fold_in(key, n), so it never changes.
    """

    params: Any
    opt_state: optax.OptState
    step: jax.Array
    key: jax.Array


def init_state(params, optimizer, key) -> TrainState:
    """The state before the first step.

    The parameters are copied, because ``train_step`` consumes the state that it is given; the caller's own stay.

    Args:
      params: the tree to train.
      optimizer: any optax transformation.
      key: PRNG key of the run.

    Raises:
      ValueError: a leaf is not of a float type, such as a quantised weight.
    """
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(f"params.{name} is {x.dtype}, which no gradient reaches; train adapters and freeze this")
    params = jax.tree.map(jnp.copy, params)
    return TrainState(params, optimizer.init(params), jnp.int32(0), jnp.copy(key))


def make_train_step(loss_fn, optimizer, *, microbatches=1, shardings=None):
    """A jitted ``(state, frozen, batch) -> (state, metrics)``; it consumes ``state``.

    Row i of the batch goes to microbatch i % microbatches, so that each stays spread over every device. The loss must
    be a weighted sum over rows with weights made over the whole batch (see ``weights``): then losses, gradients and
    metrics of microbatches add up to those of the batch.

    Args:
      loss_fn: ``(params, frozen, batch, key) -> (loss, metrics)``. A scalar metric is a weighted sum and is added over
        microbatches; a metric with axes has the rows first and comes back in the batch's order.
      optimizer: any optax transformation.
      microbatches: M >= 1, divides the leading axis of every leaf of the batch.
      shardings: of the state, pinned on what comes out (see ``sharding.by_name``); None leaves it to the compiler.

    Returns:
      The step. Its metrics are those of ``loss_fn`` with ``loss`` and ``grad_norm`` (before the optimiser).

    Raises:
      ValueError: when called with a batch that does not divide.
    """
    checks.positive("microbatches", microbatches)

    def gradients(state, frozen, batch, key):
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, frozen, batch, key)
        return grads, metrics | {"loss": loss}

    def accumulated(state, frozen, batch, key):
        deal = lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1)
        undeal = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

        def add(total, part):
            grads, metrics = gradients(state, frozen, *part)
            return jax.tree.map(jnp.add, total, grads), metrics

        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(microbatches))
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        grads, metrics = jax.lax.scan(add, zeros, (jax.tree.map(deal, batch), keys))
        return grads, jax.tree.map(lambda x: x.sum(0) if x.ndim == 1 else undeal(x), metrics)

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def train_step(state, frozen, batch):
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
            if leaf.shape[0] % microbatches:
                name = jax.tree_util.keystr(path)
                raise ValueError(
                    f"batch{name} has {leaf.shape[0]} rows, which {microbatches} microbatches do not divide"
                )
        key = jax.random.fold_in(state.key, state.step)
        how = gradients if microbatches == 1 else accumulated
        grads, metrics = how(state, frozen, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = metrics | {"grad_norm": optax.tree.norm(grads)}
        return state.replace(params=params, opt_state=opt_state, step=state.step + 1), metrics

    return train_step
