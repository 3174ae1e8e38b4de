"""Checks of what a caller hands in: every failure is a ValueError that says which argument, and what to do.

Shapes are known while JAX traces, so these checks cost nothing at run time and fire before any compilation.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def shapes(**arrays) -> Mapping[str, int]:
    """Binds axis letters to sizes, and fails where two arguments disagree.

    Args:
      **arrays: argument name to ``(array, "B T")``; a letter must mean one size throughout.

    Returns:
      The size of each letter.

    Raises:
      ValueError: an array has another number of axes, or a letter has two sizes.

    >>> dict(shapes(logps=(jnp.zeros((2, 3)), "B T"), rewards=(jnp.zeros(2), "B")))
    {'B': 2, 'T': 3}
    >>> shapes(logps=(jnp.zeros((2, 3)), "B T"), mask=(jnp.zeros((2, 4)), "B T"))
    Traceback (most recent call last):
    ValueError: mask has shape (2, 4), expected [B, T] with T=3 (from logps)
    """
    size: dict[str, int] = {}
    source: dict[str, str] = {}
    for name, (array, letters) in arrays.items():
        axes, shape = letters.split(), jnp.shape(array)
        layout = f"{name} has shape {shape}, expected [{', '.join(axes)}]"
        if len(axes) != len(shape):
            raise ValueError(layout)
        for axis, n in zip(axes, shape):
            if size.setdefault(axis, n) != n:
                raise ValueError(f"{layout} with {axis}={size[axis]} (from {source[axis]})")
            source.setdefault(axis, name)
    return size


def between(name: str, value, low: float, high: float) -> None:
    """Fails unless ``low <= value < high``. A traced value, which has no number yet, passes.

    >>> between("label_smoothing", 0.7, 0.0, 0.5)
    Traceback (most recent call last):
    ValueError: label_smoothing must be in [0.0, 0.5), got 0.7
    """
    if not isinstance(value, jax.core.Tracer) and not low <= value < high:
        raise ValueError(f"{name} must be in [{low}, {high}), got {value}")


def share(name: str, value) -> None:
    """Fails unless ``0 <= value <= 1``. A traced value passes.

    >>> share("alpha", 1.5)
    Traceback (most recent call last):
    ValueError: alpha must be in [0, 1], got 1.5
    """
    if not isinstance(value, jax.core.Tracer) and not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def positive(name: str, value) -> None:
    """Fails unless ``value > 0``. A traced value passes.

    >>> positive("beta", 0.0)
    Traceback (most recent call last):
    ValueError: beta must be above 0, got 0.0
    """
    if not isinstance(value, jax.core.Tracer) and not value > 0:
        raise ValueError(f"{name} must be above 0, got {value}")


def rows(**arrays) -> tuple[jax.Array, ...]:
    """What every function of rows does first: all are [B] and of a float type; returns them as ``floats`` does.

    >>> rows(chosen=jnp.zeros(2), rejected=jnp.zeros(3))
    Traceback (most recent call last):
    ValueError: rejected has shape (3,), expected [B] with B=2 (from chosen)
    """
    shapes(**{name: (array, "B") for name, array in arrays.items()})
    return floats(**arrays)


def floats(**arrays) -> tuple[jax.Array, ...]:
    """The arrays in float32, or in their own type where that is wider; fails for whole numbers.

    Mathematics in float32 whatever the model computes in (law 12). Whole numbers are refused, because logits or
    log-probabilities of type int are a mistake that would otherwise show as bad training.

    Args:
      **arrays: argument name to array.

    Returns:
      The arrays in the order of the arguments.

    Raises:
      ValueError: an array is not of a float type.

    >>> floats(logps=jnp.zeros(2, jnp.bfloat16))[0].dtype
    dtype('float32')
    >>> floats(logits=jnp.zeros(2, int))
    Traceback (most recent call last):
    ValueError: logits must be of a float type, got int32
    """
    out = []
    for name, array in arrays.items():
        array = jnp.asarray(array)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be of a float type, got {array.dtype}")
        out.append(array.astype(jnp.promote_types(array.dtype, jnp.float32)))
    return tuple(out)
