"""Many runs in one program: seeds, rates, coefficients of a loss, adapters, over one frozen base.

    def step_of(rate, beta):
        return make_train_step(dpo.make_loss(apply, beta=beta), optimizers.adamw(rate))

    start = lambda seed: init_state(params, optimizers.adamw(1.0), jax.random.key(seed))  # of any rate
    states = many.stack(start(seed) for seed in range(4))
    train_step = many.make_train_step(step_of)
    states, metrics = train_step(states, frozen, batch, {"rate": rates, "beta": betas})        # [4] each
    best = many.at(states, 2)

It is ``jax.vmap`` of the step of one run. What is swept is an argument of ``step_of``, so whatever a loss or an
optimiser takes as a traced number can be: the peak of a schedule, a KL coefficient, a clip. A run whose step is not
finite skips it alone. A slice is the run by itself to the rounding of float32: a product of many runs adds up in
another order than that of one.
"""

from functools import partial

import jax
import jax.numpy as jnp


def make_train_step(step_of, *, frozen_axis=None, batch_axis=None, shardings=None):
    """A jitted ``(states, frozen, batch, numbers) -> (states, metrics)``; it consumes ``states``.

    Args:
      step_of: ``(**numbers) -> train_step`` of one run; the numbers are traced.
      frozen_axis, batch_axis: 0 where every run has its own, stacked on axis 0; None where all share one.
      shardings: of the states, pinned on what comes out.

    Returns:
      The step. ``numbers`` is a dict of arrays with a number a run; metrics have the runs first.

    Raises:
      ValueError: when called with another count of numbers than of runs.
    """

    def one(state, frozen, batch, numbers):
        return step_of(**numbers)(state, frozen, batch)

    runs = jax.vmap(one, in_axes=(0, frozen_axis, batch_axis, 0))

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def train_step(states, frozen, batch, numbers):
        count = _count(states)
        for name, x in numbers.items():
            if jnp.shape(x)[:1] != (count,):
                raise ValueError(f"{name} has shape {jnp.shape(x)}, expected a number for each of {count} runs")
        return runs(states, frozen, batch, numbers)

    return train_step


def stack(states):
    """The states of runs, stacked on a new axis 0; they must be alike in everything but their numbers.

    Args:
      states: of ``init_state``, one a run.

    Raises:
      ValueError: there is none, or one is of another structure than the first.

    >>> stack([{"w": jnp.zeros(3)}, {"w": jnp.ones(3)}])["w"].shape
    (2, 3)
    """
    states = list(states)
    if not states:
        raise ValueError("states is empty; there must be a run")
    alike = lambda tree: (jax.tree.structure(tree), [(jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(tree)])
    for i, state in enumerate(states):
        if alike(state) != alike(states[0]):
            raise ValueError(f"states[{i}] has another structure, type or shape than states[0]")
    return jax.tree.map(lambda *x: jnp.stack(x), *states)


def at(states, run: int):
    """The state of one run.

    >>> float(at({"w": jnp.array([3.0, 5.0])}, 1)["w"])
    5.0
    """
    return jax.tree.map(lambda x: x[run], states)


def _count(states) -> int:
    if jnp.ndim(states.step) != 1:
        raise ValueError("states is of one run; stack the states of several: many.stack([state, ...])")
    return len(states.step)
