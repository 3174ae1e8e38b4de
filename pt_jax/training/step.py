"""One training step for any loss."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from pt_jax import checks

CARRIED = ("params", "opt_state", "averages", "reference", "extra")  # what a step changes, or leaves as it was


@struct.dataclass
class TrainState:
    """Everything that a run's next step depends on, beside its data.

    Args:
      params: what is trained, and nothing else, in float32.
      opt_state: of the optimiser.
      step: int32 scalar, batches seen: the data's cursor. Skipped ones count.
      key: PRNG key of the run; step n uses fold_in(key, n), so it never changes.
      averages: moving averages of the parameters (``averages``), or None.
      reference: parameters that follow the trained ones by a schedule (``references``), or None.
      extra: whatever else a recipe carries along, such as the coefficient of a KL controller.
      skipped: int32 scalar, batches that were not finite, and changed nothing.
      bad: int32 scalar, how many of them came in a row, up to the last one.
    """

    params: Any
    opt_state: optax.OptState
    step: jax.Array
    key: jax.Array
    averages: Any = None
    reference: Any = None
    extra: dict = struct.field(default_factory=dict)
    skipped: jax.Array = struct.field(default_factory=lambda: jnp.int32(0))
    bad: jax.Array = struct.field(default_factory=lambda: jnp.int32(0))

    @property
    def updates(self) -> jax.Array:
        """Steps that were not skipped: int32 []."""
        return self.step - self.skipped


def init_state(params, optimizer, key, *, averages=None, reference=None, extra=None) -> TrainState:
    """The state before the first step.

    Everything is copied, because ``train_step`` consumes the state that it is given; the caller's own stays. What is
    trained is kept in float32, also where it came in bfloat16, in which an update of less than 1/256 of a weight
    would be lost; in what type the model computes is said by ``models.Execution``.

    Args:
      params: the tree to train.
      optimizer: any optax transformation.
      key: PRNG key of the run.
      averages: the parameters that averages begin with, usually ``params``.
      reference: the parameters of the reference, usually ``params``. They keep their type.
      extra: a dict of arrays and numbers to carry along.

    Raises:
      ValueError: a leaf is not of a float type, such as a quantised weight.
    """
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise ValueError(
                f"params.{_name(path)} is {x.dtype}, which no gradient reaches; train adapters and freeze this"
            )
    master = lambda x: jnp.array(x, jnp.promote_types(jnp.result_type(x), jnp.float32))
    params, averages = jax.tree.map(master, (params, averages))
    reference, extra, key = jax.tree.map(lambda x: jnp.array(x), (reference, extra or {}, key))
    return _beside(params, TrainState(params, optimizer.init(params), jnp.int32(0), key, averages, reference, extra))


def _beside(params, state):
    """The state with all its leaves bound to devices, where those of the parameters are.

    After a step all are, and a step of a state that is bound in part would be compiled a second time.
    """
    bound = lambda x: isinstance(x, jax.core.Tracer) or getattr(x, "committed", False)  # a plain number is not
    where = [x.sharding for x in jax.tree.leaves(params) if not isinstance(x, jax.core.Tracer) and x.committed]
    if not where:
        return state
    of = where[0]
    whole = jax.sharding.NamedSharding(of.mesh, jax.sharding.PartitionSpec()) if hasattr(of, "mesh") else of
    return jax.tree.map(lambda x: x if bound(x) else jax.device_put(x, whole), state)


def make_train_step(loss_fn, optimizer, *, microbatches=1, shardings=None, frozen_of=None, after=(), skip_when=None):
    """A jitted ``(state, frozen, batch) -> (state, metrics)``; it consumes ``state``.

    Row i of the batch goes to microbatch i % microbatches, so that each stays spread over every device. The loss must
    be a weighted sum over rows with weights made over the whole batch (see ``weights``): then losses, gradients and
    metrics of microbatches add up to those of the batch.

    A step whose loss or gradient is not finite changes nothing of the state but ``step``, ``skipped`` and ``bad``.

    Args:
      loss_fn: ``(params, frozen, batch, key) -> (loss, metrics)``. A scalar metric is a weighted sum and is added over
        microbatches; a metric with axes has the rows first and comes back in the batch's order.
      optimizer: any optax transformation.
      microbatches: M >= 1, divides the leading axis of every leaf of the batch.
      shardings: of the state, pinned on what comes out (see ``sharding.by_name``); None leaves it to the compiler.
      frozen_of: ``(state, frozen) -> frozen``, what the loss is given of the state beside its parameters, such as
        ``references.beside``; None gives it ``frozen`` as it is.
      after: functions ``(state, metrics) -> state`` of a new state, in order: ``averages.ema(0.999)``,
        ``references.follow(every=512)``, a KL controller on ``state.extra``.
      skip_when: ``(state, metrics) -> bool []``, of the state before the step: other steps to skip, such as
        ``spikes.far_above()``.

    Returns:
      The step. Its metrics are those of ``loss_fn`` with ``loss``, ``grad_norm`` (before the optimiser) and
      ``skipped``, 1 where the step was, else 0.

    Raises:
      ValueError: when called with a batch that does not divide, with parameters narrower than float32, or when a
        function of ``after`` returns a state of another structure, type or shape.
    """
    step = make_stages(
        loss_fn, optimizer, microbatches=microbatches, frozen_of=frozen_of, after=after, skip_when=skip_when
    )

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def train_step(state, frozen, batch):
        return step(state, frozen, batch)[:2]

    return train_step


def make_stages(loss_fn, optimizer, *, microbatches=1, frozen_of=None, after=(), skip_when=None):
    """The same step as a plain function, with what it does on its way, to look into (``capture``).

    Args:
      loss_fn, optimizer, microbatches, frozen_of, after, skip_when: as ``make_train_step``.

    Returns:
      ``(state, frozen, batch) -> (state, metrics, stages)``; stages has the trees "gradients", and "updates" as they
      are added to the parameters unless the step is skipped.
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

    def step(state, frozen, batch):
        _check(state, batch, microbatches)
        key = jax.random.fold_in(state.key, state.step)
        how = gradients if microbatches == 1 else accumulated
        grads, metrics = how(state, frozen if frozen_of is None else frozen_of(state, frozen), batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = metrics | {"grad_norm": optax.tree.norm(grads)}
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        if skip_when is not None:
            good &= ~skip_when(state, metrics)
        new = state.replace(params=params, opt_state=opt_state, step=state.step + 1)
        for change in after:
            new = change(new, metrics)
        stages = {"gradients": grads, "updates": updates}
        return _either(good, new, state), metrics | {"skipped": 1 - good.astype(jnp.int32)}, stages

    return step


def _check(state, batch, microbatches):
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if leaf.shape[0] % microbatches:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} has {leaf.shape[0]} rows, which {microbatches} microbatches do not "
                "divide"
            )
    for path, x in jax.tree_util.tree_leaves_with_path(state.params):
        if jnp.promote_types(x.dtype, jnp.float32) != x.dtype:
            raise ValueError(f"state.params.{_name(path)} is {x.dtype}; init_state keeps what is trained in float32")


def _either(good, new, old) -> TrainState:
    """The new state, or the old one with its counts."""
    for field in CARRIED:
        (was, now), shape = (getattr(x, field) for x in (old, new)), lambda x: (jnp.shape(x), jnp.result_type(x))
        if jax.tree.structure(was) != jax.tree.structure(now) or jax.tree.map(shape, was) != jax.tree.map(shape, now):
            raise ValueError(f"state.{field} has another structure, type or shape after a step than before it")
    carried = {
        field: jax.tree.map(partial(jnp.where, good), getattr(new, field), getattr(old, field)) for field in CARRIED
    }
    miss = 1 - good.astype(jnp.int32)
    return old.replace(step=old.step + 1, skipped=old.skipped + miss, bad=(old.bad + 1) * miss, **carried)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
