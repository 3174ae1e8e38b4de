"""Weights in 8 or 4 bits: a frozen base that takes a quarter or an eighth of the memory of float32.

    int8   w = scale n,         n in -127 ... 127,  a scale for each output
    nf4    w = absmax code[n],  n in 0 ... 15,      the largest of every 64 inputs of an output

``nf4`` is the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3): 16
numbers that normally distributed weights use about equally often. ``nf4_double`` keeps its absmax in 8 bits too.

A quantised weight is a record (``linear.Weight``) whose arrays keep the axes of the weight, so a stack of them is
scanned, sliced and sharded as before. What is multiplied is made inside the product, and again for its gradient: of a
scanned stack, no more than one layer is ever there in full. Nothing here trains; adapters over it do.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from pt_jax.models import linear
from pt_jax.models.parameters import KEPT_FLOAT32, PRODUCTS
from pt_jax.models.placing import Filling

TARGETS = tuple(name for name in PRODUCTS if name not in ("embed", "unembed", *KEPT_FLOAT32))
BLOCK = 64  # inputs that share an absmax of nf4
GROUP = 256  # of those that share the scale of their 8 bits
# Quantiles of a normal distribution, 8 above 0 and 7 below, over the largest: create_normal_map of bitsandbytes.
CODE = np.float32([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
ZERO = 7  # its place in the code
MIDDLES = (CODE[1:] + CODE[:-1]) / 2


class Quantized(linear.Weight):
    """What ``Int8`` and ``NF4`` share: a product makes the weight in full, and forgets it."""

    def einsum(self, equation, x):
        return jax.checkpoint(lambda w, x: linear.einsum(equation, x, w.dense(x.dtype)))(self, x)

    def grouped(self, x, sizes):
        return jax.checkpoint(lambda w, x, sizes: linear.grouped(x, w.dense(x.dtype), sizes))(self, x, sizes)


@struct.dataclass
class Int8(Quantized):
    """Whole numbers of 8 bits; see ``int8``.

    Args:
      values: int8, the axes of the weight.
      scale: float32, the same with 1 in the place of every input axis.
    """

    values: jax.Array
    scale: jax.Array

    def einsum(self, equation, x):
        """The whole numbers are exact in every float type; their scale comes after the sum, in float32."""
        sides, result = linear.sides(equation), equation.split("->")[1]
        outputs = "".join(letter for letter in result if letter in sides.outputs)
        wide = jnp.promote_types(x.dtype, jnp.float32)  # a sum over 127s leaves the range of float16

        def product(w, x):
            y = jnp.einsum(equation, x, w.values.astype(x.dtype), preferred_element_type=wide)
            scale = jnp.einsum(f"{sides.weight}->{outputs}", w.scale)  # drops the axes of 1
            scale = jnp.expand_dims(scale, [i for i, letter in enumerate(result) if letter not in outputs])
            return (y * scale).astype(x.dtype)

        return jax.checkpoint(product)(self, x)

    def take(self, rows):
        return Int8(self.values[rows], self.scale[rows]).dense(jnp.float32)

    def dense(self, dtype):
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


@struct.dataclass
class NF4(Quantized):
    """Places in a code of 16 numbers, two to a byte; see ``nf4``.

    Args:
      packed: uint8, the axes of the weight; of the last input axis, numbers 2i and 2i + 1 are the high and the low
        half of byte i.
      absmax: float32, or ``Scales``; the same axes, the last input axis in blocks of 64.
      axis: the last input axis, counted from the end.
      size: its length.
    """

    packed: jax.Array
    absmax: jax.Array | linear.Weight
    axis: int = struct.field(pytree_node=False)
    size: int = struct.field(pytree_node=False)

    def take(self, rows):
        return NF4(self.packed[rows], linear.take(self.absmax, rows), self.axis, self.size).dense(jnp.float32)

    def dense(self, dtype):
        places = jnp.stack([self.packed >> 4, self.packed & 15], self.axis % self.packed.ndim + 1)
        numbers = jnp.asarray(CODE)[_joined(places, self.axis, self.size)]
        return (numbers * _spread(linear.dense(self.absmax), self.axis, BLOCK, self.size)).astype(dtype)


@struct.dataclass
class Scales(linear.Weight):
    """Numbers from 0 on in 8 bits: values * step, with a step for every 256 neighbours.

    Args:
      values: uint8.
      step: float32, the same axes, one of them in groups of 256.
      axis: which, counted from the end.
    """

    values: jax.Array
    step: jax.Array
    axis: int = struct.field(pytree_node=False)

    def take(self, rows):
        return self.values[rows].astype(jnp.float32) * self.step[rows // GROUP]

    def dense(self, dtype):
        step = _spread(self.step, self.axis, GROUP, self.values.shape[self.axis])
        return (self.values.astype(jnp.float32) * step).astype(dtype)


def int8(w, equation: str) -> Int8:
    """A weight in 8 bits, symmetric, with a scale for each output.

        scale = max over inputs |w| / 127;   n = round(w / scale);   |w - scale n| <= scale / 2

    The scale is rounded to 16 bits of mantissa, so that scale n is exact in float32 and quantising it again changes
    nothing. Numbers so small that their scale is not normal in float32 become 0.

    Args:
      w: of a float type, the axes of the weight in the equation, with any number of others before them.
      equation: of its product, as in ``parameters.PRODUCTS``.

    >>> w = int8(jnp.array([[127.0, -0.5], [1.2, 0.02]]), "nd,df->nf")
    >>> print(w.values, w.scale.round(4))
    [[ 127 -127]
     [   1    5]] [[1.     0.0039]]
    """
    w = w.astype(jnp.float32)
    inputs = _axes(equation, linear.sides(equation).inputs)
    scale = _step(jnp.max(jnp.abs(w), inputs, keepdims=True), 127)
    return Int8(jnp.round(_over(w, scale)).astype(jnp.int8), scale)


def nf4(w, equation: str) -> NF4:
    """A weight in 4 bits, with a scale for every 64 inputs of an output: 4.5 bits a weight.

        absmax = max over the block |w|;   n = the place of the number in the code that is nearest to w / absmax;
        |w - absmax code[n]| <= 0.152 absmax,   half of the widest gap of the code

    Blocks lie along the last input axis; its last block may be short. Numbers so small that they are not normal in
    float32 become 0.

    Args:
      w, equation: see ``int8``.

    >>> w = nf4(jnp.array([[2.0], [0.0], [-1.0]]), "nd,df->nf")
    >>> print(w.dense(jnp.float32).T)
    [[ 2.    0.   -1.05]]
    """
    return _nf4(w, equation, lambda absmax: absmax)


def nf4_double(w, equation: str) -> NF4:
    """As ``nf4``, with the scales in 8 bits: 4.13 bits a weight.

        step = max over 256 blocks absmax / 255;   m = floor(absmax / step), 1 at least unless absmax is 0;
        n as before, with step m in the place of absmax

    The 256 blocks are neighbours along the last output axis. QLoRA subtracts the mean and rounds to 8-bit floats.
    Counting from 0 is simpler, and rounding down makes the error smaller than that of ``nf4`` itself: the largest of
    64 is a little too large a scale for the others.

    Args:
      w, equation: see ``int8``.
    """
    (axis,) = _axes(equation, linear.sides(equation).outputs[-1])

    def in_8_bits(absmax):
        step = _step(jnp.max(_split(absmax, axis, GROUP), absmax.ndim + axis + 1), 255)
        share = _over(absmax, _spread(step, axis, GROUP, absmax.shape[axis]))
        values = jnp.maximum(jnp.floor(share + 2**-8), absmax > 0)  # 2^-8: step was rounded, and 255 must stay 255
        return Scales(values.astype(jnp.uint8), step, axis)

    return _nf4(w, equation, in_8_bits)


def _nf4(w, equation, keep):
    """``keep``: the scales in float32 -> as they are kept."""
    (axis,) = _axes(equation, linear.sides(equation).inputs[-1])
    w, size = w.astype(jnp.float32), w.shape[axis]
    absmax = keep(_normal(jnp.max(jnp.abs(_split(w, axis, BLOCK)), w.ndim + axis + 1)))
    shares = _over(w, _spread(linear.dense(absmax), axis, BLOCK, size))
    places = sum((shares > middle).astype(jnp.uint8) for middle in MIDDLES)
    pairs = _split(places, axis, 2, ZERO)
    high, low = (jax.lax.index_in_dim(pairs, half, w.ndim + axis + 1, keepdims=False) for half in (0, 1))
    return NF4(high << 4 | low, absmax, axis, size)


def quantize(params, how, targets=None) -> dict:
    """A model's weights in few bits; norms, biases, routers and, unless asked for, embeddings stay as they are.

    Leaf by leaf, and of a leaf layer by layer, so that beside ``params`` and the result there is never more than a
    layer. ``params`` are left as they were; to load a model that does not fit in full, see ``load(quantize=...)``.

    Args:
      params: the tree of ``init`` or ``load``, before adapters are attached.
      how: ``int8``, ``nf4``, ``nf4_double``, or any function (weight, equation) -> ``linear.Weight``.
      targets: names of leaves; None: all products of the layers (``TARGETS``). "embed" and "unembed" are the others
        that can be.

    Returns:
      The tree with records in the place of the targets: ``apply``, ``sample`` and adapters take it as before.

    Raises:
      ValueError: a target is unknown, not there, not of a float type, not finite, or no array any more.

    >>> params = {"layers": {"up": jnp.ones((2, 64, 3)), "mlp_norm": jnp.ones((2, 64))}}
    >>> print(jax.tree.map(lambda x: f"{x.dtype} {x.shape}", quantize(params, nf4)["layers"]["up"]))
    NF4(packed='uint8 (2, 32, 3)', absmax='float32 (2, 1, 3)', axis=-2, size=64)
    """
    flat = flatten_dict(params)
    _check_targets(targets, {path[-1] for path in flat})
    targets = TARGETS if targets is None else targets
    return unflatten_dict(
        {path: _leaf(".".join(path), w, how) if path[-1] in targets else w for path, w in flat.items()}
    )


def dequantize(params, dtype=jnp.float32) -> dict:
    """The tree with every quantised weight as an array of this type again, wherever it stands; the rest is untouched.

    >>> w = int8(jnp.array([[1.0, -3.0]]), "nd,df->nf")
    >>> print(dequantize({"up": w})["up"])
    [[ 1. -3.]]
    """
    known = lambda w: isinstance(w, Quantized)
    return jax.tree.map(lambda w: _dense(w, dtype) if known(w) else w, params, is_leaf=known)


class QuantizedFilling:
    """As ``placing.Filling``, of a record: a part is quantised when it is put, and the arrays that come of it placed.

    Args:
      name: of the leaf.
      form: the record with a shape in the place of every array.
      shardings: the same of shardings.
      how: as ``quantize``.
    """

    def __init__(self, name, form, shardings, how):
        self.name, self.how = name, how
        self.fillings = jax.tree.map(lambda x, sharding: Filling(x.shape, x.dtype, sharding), form, shardings)

    def put(self, part, at=()):
        """Puts an array, or what numpy makes one of, at the indices ``at`` of the leading axes."""
        made = _made(np.asarray(part), self.how, PRODUCTS[self.name])
        made = _checked(".".join(map(str, (self.name, *at))), *made)
        jax.tree.map(lambda filling, x: filling.put(np.asarray(x), at), self.fillings, made)

    def array(self):
        """The record."""
        return jax.tree.map(Filling.array, self.fillings)


def _check_targets(targets, there):
    for name in () if targets is None else targets:
        if name in KEPT_FLOAT32 or name not in PRODUCTS:
            known = ", ".join((*TARGETS, "embed", "unembed"))
            raise ValueError(f"targets names {name!r}, which is not quantised; known are {known}")
        if name not in there:
            raise ValueError(f"targets names {name!r}, which these parameters do not have")


def _leaf(name, w, how):
    if isinstance(w, linear.Weight):
        done = "is quantised already" if isinstance(w, Quantized) else "has an adapter"
        raise ValueError(f"params.{name} {done} ({type(w).__name__}); quantize takes a tree of arrays")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"params.{name} must be of a float type, got {w.dtype}")
    return _checked(f"params.{name}", *_stacked(w, how, PRODUCTS[name.split(".")[-1]]))


def _checked(name, made, finite):
    """A record that was made of finite numbers. Its scales do not tell: on a CPU, a maximum may pass over a NaN."""
    if not isinstance(finite, jax.core.Tracer) and not finite:
        raise ValueError(f"{name} holds numbers that are not finite, for which there is no scale")
    return made


@partial(jax.jit, static_argnums=(1, 2))
def _made(w, how, equation):
    return how(w, equation), jnp.isfinite(w).all()


@partial(jax.jit, static_argnums=(1, 2))
def _stacked(w, how, equation):
    """Of a weight or, one after the other, of those stacked on axis 0."""
    one = lambda w: how(w, equation)
    made = one(w) if w.ndim == len(linear.sides(equation).weight) else jax.lax.map(one, w)
    return made, jnp.isfinite(w).all()


@partial(jax.jit, static_argnums=1)
def _dense(w, dtype):
    return w.dense(dtype)


def _axes(equation, letters):
    """Of a weight, counted from the end."""
    weight = linear.sides(equation).weight
    return tuple(weight.index(letter) - len(weight) for letter in letters)


def _normal(scale):
    """0 where it is subnormal: some machines drop these, others have few digits of them."""
    return jnp.where(scale < jnp.finfo(jnp.float32).tiny, 0, scale)


def _step(largest, steps):
    """largest / steps, rounded so that a product with any number of steps is exact."""
    return _normal(jax.lax.reduce_precision(largest * np.float32(1 / steps), exponent_bits=8, mantissa_bits=15))


def _over(w, scale):
    """w / scale, 0 where that is 0."""
    return jnp.where(scale > 0, w / jnp.where(scale > 0, scale, 1), 0)


def _split(x, axis, width, fill=0):
    """[..., n, ...] -> [..., n / width, width, ...], filled up where that does not divide."""
    axis %= x.ndim
    x = jnp.pad(x, [(0, -n % width if i == axis else 0) for i, n in enumerate(x.shape)], constant_values=fill)
    return x.reshape(*x.shape[:axis], -1, width, *x.shape[axis + 1 :])


def _joined(x, axis, size):
    """The inverse of ``_split``: axes ``axis`` (of the result) and the one behind it become one of this size."""
    axis %= x.ndim - 1
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, size, axis=axis)


def _spread(x, axis, width, size):
    """Each number of an axis ``width`` times, up to this size."""
    return jax.lax.slice_in_dim(jnp.repeat(x, width, axis), 0, size, axis=axis % x.ndim)
