"""Moving averages of the parameters, for ``make_train_step(..., after=[averages.ema(0.999)])``.

    m_n = m_{n-1} + rate_n (p_n - m_{n-1}),   p_n the parameters after update n

They lie in ``state.averages`` (``init_state(..., averages=params)``) and can be used in the place of the parameters at
any moment. An update that was skipped is none.
"""

import jax.numpy as jnp
import optax

from pt_jax import checks


def ema(decay: float = 0.999):
    """The exponential moving average, without its bias towards where it began.

        rate_n = (1 - decay) / (1 - decay^n)

    This is m / (1 - decay^n) with m_0 = 0 of Kingma and Ba 2015, https://arxiv.org/abs/1412.6980, section 3, stored
    after its correction. It looks back over some 1 / (1 - decay) updates.

    Args:
      decay: in [0, 1); with 0 it is the parameters themselves.

    Returns:
      A function for ``after``.

    Raises:
      ValueError: the decay is out of range.

    >>> from pt_jax.training import init_state
    >>> state = init_state({"w": jnp.array([1.0])}, optax.sgd(1.0), None, averages={"w": jnp.array([9.0])})
    >>> for n, w in enumerate([2.0, 5.0], 1):  # 2, then (0.5 * 2 + 5) / 1.5
    ...     state = ema(0.5)(state.replace(params={"w": jnp.array([w])}, step=n), {})
    >>> print(state.averages["w"])
    [4.]
    """
    checks.between("decay", decay, 0.0, 1.0)
    step = 1 - decay  # and not decay from here on, which rounds to 1 in float32 sooner
    return _follow(lambda n: -step / jnp.expm1(n * jnp.log1p(-jnp.float32(step))))


def polyak(start: int = 0):
    """The plain mean of the parameters after every update from number ``start`` + 1 on.

        rate_n = 1 / (n - start)

    Polyak and Juditsky 1992, https://doi.org/10.1137/0330046. Until then it is the parameters themselves.

    Args:
      start: updates that are left out, >= 0.

    Returns:
      A function for ``after``.

    Raises:
      ValueError: start is negative.
    """
    checks.between("start", start, 0, float("inf"))
    return _follow(lambda n: 1 / jnp.maximum(n - start, 1))


def _follow(rate):
    def after(state, metrics):
        if state.averages is None:
            raise ValueError("the state has no averages; make it with init_state(..., averages=params)")
        step_size = rate(jnp.float32(state.updates))
        return state.replace(averages=optax.incremental_update(state.params, state.averages, step_size))

    return after
