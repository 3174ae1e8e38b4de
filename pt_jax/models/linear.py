"""The products of a model with its weights, whatever a weight is.

A weight is an array, or a ``Weight``: a small record of arrays that knows how to multiply, such as a base with an
adapter beside it (``lora``) or numbers of four bits (``quantize``). The model calls ``einsum``, ``grouped`` and
``take`` and does not ask which. A record is a pytree, so a stack of layers is scanned, sharded and differentiated as
before.

An equation says which axes of a weight are its inputs (in x, not in the result) and which its outputs:
"btd,dhc->bthc" has the input d and the outputs h and c.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pt_jax.models import blocks


class Sides(NamedTuple):
    """Letters of a product's equation.

    Args:
      weight: axes of the weight as stored, those of a group in front.
      inputs: those that are summed.
      outputs: those that are in the result.
      groups: those that are neither: one weight for each of several groups of rows.
    """

    weight: str
    inputs: str
    outputs: str
    groups: str


def sides(equation: str) -> Sides:
    """Which axes of the weight are inputs, outputs, or number the groups.

    >>> sides("bthc,hcd->btd")
    Sides(weight='hcd', inputs='hc', outputs='d', groups='')
    >>> sides("nd,edf->nf")
    Sides(weight='edf', inputs='d', outputs='f', groups='e')
    """
    terms, result = equation.split("->")
    x, weight = terms.split(",")
    pick = lambda keep: "".join(letter for letter in weight if keep(letter))
    return Sides(
        weight,
        pick(lambda n: n in x and n not in result),
        pick(lambda n: n in result),
        pick(lambda n: n not in x and n not in result),
    )


class Weight:
    """What a weight that is not an array must know. Subclasses are ``flax.struct`` dataclasses."""

    def einsum(self, equation, x):
        """The product of ``equation`` with x, in the type of x."""
        raise NotImplementedError

    def grouped(self, x, sizes):
        """``grouped`` of x [N, i] with this weight, of shape [E, i, o]."""
        return grouped(x, self.dense(x.dtype), sizes)

    def take(self, rows):
        """Rows of this weight, of shape [v, d]: an embedding looked up."""
        raise NotImplementedError

    def dense(self, dtype):
        """The same weight as an array of this type."""
        raise NotImplementedError


def einsum(equation: str, x, w):
    """The product of x with a weight, in the type of x.

    Args:
      equation: "x,weight->result".
      x: array.
      w: array or ``Weight``.
    """
    if isinstance(w, Weight):
        return w.einsum(equation, x)
    return (_of_matrices if _flattens() else jnp.einsum)(equation, x, w.astype(x.dtype))


def _flattens() -> bool:
    """Whether to write products as those of matrices: on CPUs, unless the tokens of a row lie on several devices.

    The gradient of a weight sums over rows and tokens, two axes, and XLA's CPU backend transposes the operands of such
    a product in memory first, at 10 to 70 ns a number where the columns lie 4 KiB apart: more than half of a train
    step. Products of matrices it hands over as they are. Of tokens on several devices, one axis would gather them.
    """
    return jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().shape.get("context", 1) == 1


def _of_matrices(equation, x, w):
    """``jnp.einsum`` of an equation whose axes of one kind are neighbours, as a product of two matrices."""
    weight, inputs, outputs, _ = sides(equation)
    kept = x.shape[: x.ndim - len(inputs)]
    count = lambda letters: math.prod(w.shape[weight.index(n)] for n in letters)
    x = x.reshape(math.prod(kept), count(inputs))
    if weight.startswith(outputs):
        y = jnp.einsum("ni,oi->no", x, w.reshape(count(outputs), count(inputs)))
    else:
        y = jnp.einsum("ni,io->no", x, w.reshape(count(inputs), count(outputs)))
    return y.reshape(*kept, *(w.shape[weight.index(n)] for n in outputs))


def grouped(x, w, sizes):
    """Rows x [N, i], those of one group together, times each group's weight.

        out[n] = x[n] @ w[e]   for the rows n of group e

    Args:
      x: [N, i]; the first sizes[0] rows are of group 0, and so on.
      w: [E, i, o], array or ``Weight``.
      sizes: [E] int32, together N.

    Returns:
      [N, o] in the type of x.
    """
    if isinstance(w, Weight):
        return w.grouped(x, sizes)
    # of tens of experts, ten times as fast on a CPU; elsewhere ragged_dot is a kernel
    product = blocks.grouped if jax.default_backend() == "cpu" else jax.lax.ragged_dot
    return product(x, w.astype(x.dtype), sizes)


def take(w, rows):
    """w[rows]: an embedding looked up."""
    return w.take(rows) if isinstance(w, Weight) else w[rows]


def dense(w, dtype=None):
    """A weight as an array, in its own type or in this one."""
    if isinstance(w, Weight):
        return w.dense(jnp.float32 if dtype is None else dtype)
    return w if dtype is None else w.astype(dtype)
