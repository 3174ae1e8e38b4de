"""Steps whose loss or gradient is far above those before it can be skipped, as those that are not finite are.

    state = init_state(params, optimizer, key, extra={"spikes": spikes.history(128)})
    step = make_train_step(loss_fn, optimizer, skip_when=spikes.far_above(6.0), after=[spikes.remember])

Without this a spike is trained on, and seen in the metrics. What is skipped is not remembered; so a loss that has risen
for good is skipped for good, until the loop ends the run after so many skipped steps in a row.
"""

import jax.numpy as jnp

from pt_jax import checks

LOOKED_AT = ("loss", "grad_norm")


def history(window: int = 128) -> dict:
    """Room for the losses and the norms of the last steps that were not skipped.

    Args:
      window: how many; none is skipped before as many are there.
    """
    checks.positive("window", window)
    return {name: jnp.full(window, jnp.nan) for name in LOOKED_AT}


def far_above(sigmas: float = 6.0):
    """For ``skip_when``: the loss or the gradient's norm is above mean + sigmas deviations of its history.

    A rise of a millionth of the mean, which may be rounding, is never far.

    Args:
      sigmas: > 0.

    Returns:
      ``(state, metrics) -> bool []``.

    Raises:
      ValueError: sigmas is not above 0.

    >>> from pt_jax.training import init_state
    >>> import optax
    >>> past = {"loss": jnp.array([1.0, 3.0]), "grad_norm": jnp.array([1.0, 1.0])}
    >>> state = init_state({}, optax.sgd(1.0), None, extra={"spikes": past})
    >>> [bool(far_above(2.0)(state, {"loss": loss, "grad_norm": 1.0})) for loss in (3.9, 4.1)]
    [False, True]
    """
    checks.positive("sigmas", sigmas)

    def skip_when(state, metrics):
        far = jnp.bool_(False)
        for name, seen in _of(state).items():
            mean = seen.mean()  # NaN until the window is full, and nothing is above it
            far |= metrics[name] > mean + sigmas * seen.std() + 1e-6 * jnp.abs(mean)
        return far

    return skip_when


def remember(state, metrics):
    """For ``after``: the oldest loss and norm give way to the newest."""
    past = _of(state)
    at = (state.updates - 1) % len(past["loss"])
    new = {name: seen.at[at].set(metrics[name]) for name, seen in past.items()}
    return state.replace(extra=state.extra | {"spikes": new})


def _of(state):
    if "spikes" not in state.extra:
        raise ValueError('the state has no history; make it with init_state(..., extra={"spikes": spikes.history()})')
    return state.extra["spikes"]
