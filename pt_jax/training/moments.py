"""Moments of an optimiser in 16 or in 8 bits: ``moments.in_bfloat16(optimizers.adamw(1e-4))``.

Any optax transformation computes as before, in float32; between two steps its large arrays are kept small, rounded up
or down at random, with the chances that make the mean right. Rounded to the nearest, a moment stands still where a step
changes it by less than half of its last digit: with b2 = 0.999 a second moment moves by a thousandth at a time, and a
bfloat16 has 1/256. The random numbers are those of the update's number, so a run is repeated bit for bit.

That is why second moments are in bfloat16 at the least: what 8 bits lose at each of the thousand steps that a second
moment looks back adds up to more than the moment itself.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from pt_jax import checks

LEAST = 4096  # entries of an array that is worth it; norms and biases stay as they are


class Stored(NamedTuple):
    """The state of an optimiser whose arrays are kept small.

    Args:
      count: int32 scalar, updates done.
      inner: the optimiser's own state, with a ``BFloat16`` or ``Float8`` in the place of each large array.
    """

    count: jax.Array
    inner: Any


@struct.dataclass
class BFloat16:
    """An array in 16 bits."""

    values: jax.Array

    @classmethod
    def of(cls, x, draws):
        return cls(_round(x, draws, digits=7, least=-119).astype(jnp.bfloat16))

    def read(self):
        return self.values.astype(jnp.float32)


@struct.dataclass
class Float8:
    """An array in 8 bits (e4m3) and, for every row along its last axis, a float32 scale: [..., 1]."""

    values: jax.Array
    scale: jax.Array

    @classmethod
    def of(cls, x, draws):
        scale = jnp.max(jnp.abs(x), -1, keepdims=True) / 448
        y = jnp.clip(x / jnp.where(scale > 0, scale, 1), -448, 448)  # a quotient may be rounded beyond
        return cls(_round(y, draws, digits=3, least=-6).astype(jnp.float8_e4m3fn), scale)

    def read(self):
        return self.values.astype(jnp.float32) * self.scale


def in_bfloat16(optimizer, *, least: int = LEAST):
    """An optimiser whose large float32 arrays are kept in bfloat16: half the memory.

    Args:
      optimizer: any optax transformation.
      least: entries from which on an array is kept small, >= 1.

    Returns:
      An optax transformation; its state is ``Stored``.

    Raises:
      ValueError: least is not above 0.

    >>> state = in_bfloat16(optax.adam(1e-3)).init({"w": jnp.zeros((64, 64)), "norm": jnp.zeros(64)})
    >>> sum(x.nbytes for x in jax.tree.leaves(state))  # two moments of 4096 times 2 bytes and 64 times 4; two counts
    16904
    """
    return _stored(optimizer, BFloat16, least)


def in_8_bits(optimizer, *, least: int = LEAST):
    """An optimiser whose large float32 arrays are kept in 8 bits and a scale a row, second moments in bfloat16.

    AdamW's moments take 3 bytes a parameter instead of 8, those of Lion, Muon and momentum one instead of 4. A second
    moment is what optax calls ``nu``. While a step writes it, an array is there in float32 too. Dettmers et al. 2022,
    https://arxiv.org/abs/2110.02861, have 8 bits for both, of another code, rounded to the nearest. Arguments and
    result as ``in_bfloat16``.
    """
    return _stored(optimizer, Float8, least)


def _stored(optimizer, kind, least):
    checks.positive("least", least)
    optimizer = optax.with_extra_args_support(optimizer)
    is_stored = lambda x: isinstance(x, BFloat16 | Float8)

    def write(count, tree):
        leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)

        def one(i, path, x):
            if jnp.result_type(x) != jnp.float32 or jnp.size(x) < least:
                return x
            second = any(getattr(entry, "name", None) == "nu" for entry in path)
            return (BFloat16 if second else kind).of(x, _draws(x.shape, count, i))

        return treedef.unflatten([one(i, path, x) for i, (path, x) in enumerate(leaves)])

    def read(tree):
        return jax.tree.map(lambda x: x.read() if is_stored(x) else x, tree, is_leaf=is_stored)

    def init(params):
        return Stored(jnp.int32(0), write(0, optimizer.init(params)))

    def update(updates, state, params=None, **more):
        updates, inner = optimizer.update(updates, read(state.inner), params, **more)
        return updates, Stored(state.count + 1, write(state.count + 1, inner))

    return optax.GradientTransformationExtraArgs(init, update)


def _round(x, draws, *, digits, least):
    """x with so many binary digits behind its first, up or down at random, so that the mean is x.

    Args:
      x: float32.
      draws: of x's shape, uniform in [0, 1).
      digits: of the mantissa that is kept.
      least: exponent below which the last digit stays where it is.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    first = jax.lax.bitcast_convert_type(bits & jnp.uint32(0x7F800000), jnp.float32)  # the power of two in x
    unit = jnp.maximum(first * 2.0**-digits, 2.0 ** (least - digits))
    return jnp.sign(x) * jnp.floor(jnp.abs(x) / unit + draws) * unit


def _draws(shape, count, leaf: int):
    """Uniform numbers in [0, 1) for an array: hashes of the place of an entry, of the array and of the update.

    They are computed where they are needed, entry by entry; those of ``jax.random`` would be arrays in float32 of the
    size that is to be saved. The hash is lowbias32 (Wellons 2018, https://nullprogram.com/blog/2018/07/31/).
    """
    place = jnp.zeros(shape, jnp.uint32)
    for axis, n in enumerate(shape):
        place = place * jnp.uint32(n) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    seed = _hash(_hash(jnp.uint32(leaf)) + jnp.asarray(count).astype(jnp.uint32))
    return (_hash(_hash(place) ^ seed) >> 8).astype(jnp.float32) * 2.0**-24


def _hash(x):
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
