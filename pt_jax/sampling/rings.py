"""Rings of any cache: how its rows and columns are moved, whatever its arrays are.

An array may have an axis of rows and one of columns, those that grow with the rows and with the length that
``init_cache`` is asked for. Token n of a row is written to column n mod the number of columns, whatever that is: so an
array of few columns holds the last few tokens.
"""

from functools import partial

import jax
import jax.numpy as jnp


def axes(init_cache):
    """The axis of rows and the axis of columns of every array, each or -1, as two trees of the cache's shape."""
    # a ring of one column has that one at any length but 0
    one, rows, columns = (jax.eval_shape(partial(init_cache, *size)) for size in ((1, 1), (2, 1), (1, 0)))

    def axis(a, b):  # of an array without numbers none: there is nothing to move
        return next((i for i, (m, n) in enumerate(zip(a.shape, b.shape)) if m != n and 0 not in a.shape), -1)

    return jax.tree.map(axis, one, rows), jax.tree.map(axis, one, columns)


def widened(cache, larger, init_cache, written):
    """A cache in a larger one, which is empty.

    Args:
      cache: of some rows.
      larger: of as many rows, and at least as many columns.
      init_cache: of both.
      written: how many columns have been written so far.
    """

    def widen(x, into, axis):
        n, m = (None, None) if axis < 0 else (x.shape[axis], into.shape[axis])
        if n == m:
            return into if 0 in into.shape else x
        if n == 0:
            return into
        oldest_first = jnp.roll(x, -(written % n), axis)
        at = [m - n if i == axis else 0 for i in range(x.ndim)]
        return jnp.roll(jax.lax.dynamic_update_slice(into, oldest_first, at), written % m, axis)

    return jax.tree.map(widen, cache, larger, axes(init_cache)[1])


def inserted(cache, new, fresh, rows, init_cache, turn):
    """A cache whose ``rows`` hold other texts.

    Args:
      cache: of all rows.
      new: of some rows, with no more columns than ``cache``, the first of which is column 0.
      fresh: of as many rows, empty, and with the columns of ``cache``.
      rows: [R] int32, where to put them; those out of range are dropped.
      init_cache: of all.
      turn: how many columns further on they go.
    """

    def insert(x, new, fresh, of_rows, of_columns):
        if of_rows < 0:
            return x
        if of_columns >= 0:
            new = jax.lax.dynamic_update_slice(fresh, new, [0] * new.ndim)
            new = jnp.roll(new, turn % x.shape[of_columns], of_columns)
        return x.at[(slice(None),) * of_rows + (rows,)].set(new, mode="drop")

    return jax.tree.map(insert, cache, new, fresh, *axes(init_cache))


def taken(cache, rows, init_cache):
    """A cache of some rows of another."""
    take = lambda x, axis: x if axis < 0 else jnp.take(x, rows, axis)
    return jax.tree.map(take, cache, axes(init_cache)[0])
