"""Rows times the weights of their groups, block by block: what ``linear.grouped`` computes without a kernel for it.

``jax.lax.ragged_dot`` is a kernel on TPUs and GPUs. On a CPU it multiplies every row with every weight. Here the rows
of a group are cut into blocks, and each block is multiplied with its group's weight alone:

    out[n] = x[n] @ w[e],   dx[n] = g[n] @ w[e]^T,   dw[e] = sum over n of x[n]^T g[n]   for the rows n of group e

A last block that reaches into the next group is written first and overwritten by that group's own. Sums are in the
order of the rows: the same from run to run.
"""

import functools

import jax
import jax.numpy as jnp


def grouped(x, w, sizes):
    """See ``linear.grouped``; rows beyond the groups are 0.

    >>> x, w = jnp.ones((3, 2)), jnp.arange(2.0)[:, None, None] * jnp.ones((2, 2, 1))
    >>> print(grouped(x, w, jnp.array([1, 2]))[:, 0])
    [0. 2. 2.]
    """
    block = min(max(len(x) // len(w), 8), 64)  # about the rows of a group
    return _grouped(x, w, jnp.asarray(sizes), block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped(x, w, sizes, block):
    return _products(x, w, sizes, block, 1)


def _forward(x, w, sizes, block):
    return _products(x, w, sizes, block, 1), (x, w, sizes)


def _backward(block, residuals, g):
    x, w, sizes = residuals
    return _products(g, w, sizes, block, 2), _sums(x, g, sizes, block).astype(w.dtype), None


_grouped.defvjp(_forward, _backward)


def _blocks(sizes, block):
    """How many blocks there are, and a function of a block's number: its group, its first row, its group's end."""
    end, count = jnp.cumsum(sizes), -(-sizes // block)
    last = jnp.cumsum(count)

    def of(i):
        group = jnp.searchsorted(last, i, side="right")
        first = end[group] - sizes[group] + (i - last[group] + count[group]) * block
        return group, first, end[group]

    return last[-1], of


def _products(x, w, sizes, block, axis):
    """Each row times its group's weight, along this axis of w."""
    rows, width = x.shape
    count, of = _blocks(sizes, block)
    padded = jnp.pad(x, ((0, block), (0, 0)))

    def put(i, out):
        group, first, _ = of(i)
        some = jax.lax.dynamic_slice(padded, (first, 0), (block, width))
        one = jax.lax.dynamic_index_in_dim(w, group, keepdims=False)
        product = jax.lax.dot_general(some, one, (((1,), (axis - 1,)), ((), ())))
        return jax.lax.dynamic_update_slice(out, product, (first, 0))

    out = jax.lax.fori_loop(0, count, put, jnp.zeros((rows + block, w.shape[3 - axis]), x.dtype))[:rows]
    return jnp.where((jnp.arange(rows) < sizes.sum())[:, None], out, 0)


def _sums(x, g, sizes, block):
    """The gradient of the weights [E, i, o], in float32."""
    count, of = _blocks(sizes, block)
    x, g = (jnp.pad(y, ((0, block), (0, 0))) for y in (x, g))

    def add(i, total):
        group, first, end = of(i)
        mine = (first + jnp.arange(block) < end)[:, None]
        some, of_out = (jax.lax.dynamic_slice(y, (first, 0), (block, y.shape[1])) for y in (x, g))
        # both, since an infinite number of the next group times 0 would be no number
        some, of_out = jnp.where(mine, some, 0), jnp.where(mine, of_out, 0)
        outer = jax.lax.dot_general(some, of_out, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        before = jax.lax.dynamic_index_in_dim(total, group)
        return jax.lax.dynamic_update_slice(total, before + outer[None], (group, 0, 0))

    return jax.lax.fori_loop(0, count, add, jnp.zeros((len(sizes), x.shape[1], g.shape[1]), jnp.float32))
