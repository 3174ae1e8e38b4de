"""Which token sees which, and where each stands in its text: all that ``seen`` says.

    [B, T] bool       one text a row, False for padding, on either side
    [B, T] int32      several texts a row that do not see each other: 1, 2, 3, ... number them, 0 is padding
    [B, T, 2] int32   the same with texts that begin alike: (text, branch). Branch 0 is the beginning; each of the
                      branches 1, 2, ... goes on from it, and sees the beginning and itself

Every text begins at position 0; a branch goes on from the position where the beginning of its text ends. So a prompt
stands once in front of all its answers, and each of them is computed as if it stood there alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sight(NamedTuple):
    """What queries see of keys, windows aside.

    Args:
      position: [B, T] int32 of each query in its text.
      visible: [B, 1, T, S] bool.
      behind: [B, 1, T, S] int32, how many tokens of its text a visible key lies behind a query.
    """

    position: jax.Array
    visible: jax.Array
    behind: jax.Array


def check(seen) -> None:
    """Fails unless ``seen`` is of one of the three forms.

    >>> check(jnp.ones((2, 3)))
    Traceback (most recent call last):
    ValueError: seen is of type float32; give bool (not padding), or int32 numbers of texts
    """
    if seen.dtype not in (bool, jnp.int32):
        raise ValueError(f"seen is of type {seen.dtype}; give bool (not padding), or int32 numbers of texts")
    if seen.ndim == 3 and (seen.shape[2] != 2 or seen.dtype == bool):
        raise ValueError(
            f"seen has shape {seen.shape} and type {seen.dtype}; with three axes it is [B, T, 2] int32: text, branch"
        )


def sight(seen) -> Sight:
    """What the tokens of whole rows see of each other; those that continue a cache ask ``cache.begin``.

    Args:
      seen: of one of the forms above, T tokens a row.
    """
    visible = jnp.tri(seen.shape[1], dtype=bool)[None, None]
    if seen.dtype == bool:
        visible = visible & seen[:, None, None]
        position = jnp.maximum(jnp.cumsum(seen, 1) - 1, 0)
    else:
        text, branch = (seen, jnp.zeros_like(seen)) if seen.ndim == 2 else (seen[..., 0], seen[..., 1])
        query, key = (lambda x: x[:, None, :, None]), (lambda x: x[:, None, None, :])
        mine = (key(branch) == 0) | (key(branch) == query(branch))
        visible = visible & mine & (key(text) == query(text)) & (key(text) != 0)
        position = jnp.maximum(visible.sum(-1)[:, 0] - 1, 0)
    return Sight(position, visible, position[:, None, :, None] - position[:, None, None])


def to_front(seen):
    """Where each row's tokens go so that what is seen stands in front, in order, and the padding behind.

    Args:
      seen: [B, T] bool.

    Returns:
      order and its inverse, both [B, T] int32, for ``arranged``.

    >>> order, back = to_front(jnp.array([[False, True, True, False]]))
    >>> print(order, back)
    [[1 2 0 3]] [[2 0 1 3]]
    """
    order = jnp.argsort(~seen, 1, stable=True)
    return order, jnp.argsort(order, 1)


def arranged(x, order, rows=0):
    """The tokens of each row in another order.

    Args:
      x: an array with the rows on axis ``rows`` and their tokens on the next.
      order: [B, T] int32.
      rows: which axis.

    >>> print(arranged(jnp.array([[5, 6, 7]]), jnp.array([[1, 2, 0]])))
    [[6 7 5]]
    """
    return jax.vmap(lambda x, i: jnp.take(x, i, rows, mode="clip"), (rows, 0), rows)(x, order)
