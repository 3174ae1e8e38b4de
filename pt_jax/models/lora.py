"""Low-rank adapters: a tree of their own beside weights that do not move.

    W' = W + s A B          s = alpha / r, or alpha / sqrt(r)
    W' = m (W + s A B) / |W + s A B|,   the norm over the inputs, for every output     (DoRA)

Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1; the square root: Kalajdzievski 2023,
https://arxiv.org/abs/2312.03732, equation 4; DoRA: Liu et al. 2024, https://arxiv.org/abs/2402.09353, equation 5.

    adapters = lora.init(key, params, how)                      # trained: a dict of small arrays
    step = make_train_step(lora.adapted(loss_fn, how), ...)     # step(state, (params, frozen), batch)
    tree = lora.attach(params, adapters, how)                   # for apply, the sampler, a score: moves no data
    full = lora.fold(params, adapters, how)                     # plain weights again

The tree has the paths of what it adapts: {"layers": {"wq": {"a": [L, d, r], "b": [L, r, h, c]}}}. In general a is
[stack, groups, inputs, r] and b [stack, groups, r, outputs], with DoRA's m [stack, groups, outputs]; which axes these
are is read from the leaf's equation in ``parameters.PRODUCTS``. B is 0 at first, so the model starts as it was, bit for
bit; with DoRA, to rounding. Several adapters stacked on a leading axis go through ``jax.vmap`` of a function of one.

An adapted embedding that is tied is adapted as one matrix, where tokens are read and where they are predicted. PEFT
does so with ``ensure_weight_tying``.
"""

import fnmatch
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from pt_jax import checks
from pt_jax.models import linear
from pt_jax.models.parameters import PRODUCTS

ATTENTION = ("wq", "wk", "wv", "wo")
BY_DEFAULT = (*ATTENTION, "gate", "up", "down")


@dataclass(frozen=True)
class Adapter:
    """What an adapter is like.

    Args:
      rank: r, columns of A.
      alpha: the scale is alpha / rank.
      targets: which products are adapted: patterns as of file names, of the last name on a leaf's path: "wq", "w[qkv]",
        "expert_*". Each must match something. None: all products of attention and of feed-forward networks; in a model
        with experts, of attention alone, for which PEFT has a form.
      rslora: whether the scale is alpha / sqrt(rank).
      dora: whether the norms of the outputs are trained apart.
      overrides: (pattern, rank, alpha) of targets that have their own; the first that matches counts.

    Raises:
      ValueError: a rank or an alpha is not above 0, or targets is one text.

    >>> Adapter(rank=4, alpha=8.0).scale("wq"), Adapter(rank=4, alpha=8.0, rslora=True).scale("wq")
    (2.0, 4.0)
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] | None = None
    rslora: bool = False
    dora: bool = False
    overrides: tuple[tuple[str, int, float], ...] = ()

    def __post_init__(self):
        for name in ("targets", "overrides"):
            given = getattr(self, name)
            if isinstance(given, str):
                raise ValueError(f"{name} is the text {given!r}; give a tuple of patterns: ({given!r},)")
            object.__setattr__(self, name, None if given is None else tuple(given))  # hashable, also from a list
        if self.targets == ():
            raise ValueError("targets is empty, so nothing would be trained; None is the usual products")
        for of, rank, alpha in (("", self.rank, self.alpha), *((f" of {p!r}", r, a) for p, r, a in self.overrides)):
            checks.positive(f"rank{of}", rank)
            if rank != int(rank):
                raise ValueError(f"rank{of} must be a whole number, got {rank}")
            checks.positive(f"alpha{of}", alpha)

    def of(self, name: str) -> tuple[int, float]:
        """Rank and alpha of a target."""
        own = ((rank, alpha) for pattern, rank, alpha in self.overrides if fnmatch.fnmatchcase(name, pattern))
        return next(own, (self.rank, self.alpha))

    def scale(self, name: str) -> float:
        """What A B is multiplied by."""
        rank, alpha = self.of(name)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


# ---- weights with an adapter


@struct.dataclass
class LoRA(linear.Weight):
    """W + scale A B, which is never formed in a product.

    Args:
      w: the weight beneath, an array or a ``Weight``.
      a: [*stack, *groups, *inputs, r].
      b: [*stack, *groups, r, *outputs].
      scale: of the product of both.
      name: of the leaf, whose equation in ``PRODUCTS`` says which axes are which.
    """

    w: Any
    a: jax.Array
    b: jax.Array
    scale: float = struct.field(pytree_node=False)
    name: str = struct.field(pytree_node=False)

    def einsum(self, equation, x):
        x_axes, result = equation.split(",")[0], equation.split("->")[1]
        _, inputs, outputs, _ = linear.sides(equation)
        rows = "".join(n for n in result if n not in outputs)
        low = jnp.einsum(f"{x_axes},{inputs}r->{rows}r", x, self.a.astype(x.dtype))
        return linear.einsum(equation, x, self.w) + self.scale * jnp.einsum(
            f"{rows}r,r{outputs}->{result}", low, self.b.astype(x.dtype)
        )

    def grouped(self, x, sizes):
        low = linear.grouped(x, self.a, sizes)
        return linear.grouped(x, self.w, sizes) + self.scale * linear.grouped(low, self.b, sizes)

    def take(self, rows):
        y = linear.take(self.w, rows)
        low = jnp.einsum("r...,dr->...d", jnp.take(self.b, rows, 1), self.a)
        return y + (self.scale * low).astype(y.dtype)

    def dense(self, dtype):
        weight, inputs, outputs, groups = linear.sides(PRODUCTS[self.name])
        delta = jnp.einsum(
            f"...{groups}{inputs}r,...{groups}r{outputs}->...{weight}", self.a, self.b, precision="highest"
        )
        return (linear.dense(self.w, jnp.float32) + self.scale * delta).astype(dtype)


@struct.dataclass
class DoRA(LoRA):
    """m (W + scale A B) / |W + scale A B|; the norm is a constant to the gradient (section 4.3 of the paper).

    Args:
      w, a, b, scale, name: as ``LoRA``.
      m: [*stack, *groups, *outputs], the norms.
    """

    m: jax.Array

    def einsum(self, equation, x):
        share = self._share()
        share = share.reshape((1,) * (len(equation.split("->")[1]) - share.ndim) + share.shape)
        return LoRA.einsum(self, equation, x) * share.astype(x.dtype)

    def grouped(self, x, sizes):
        return linear.grouped(x, self.dense(x.dtype), sizes)

    def dense(self, dtype):
        _, inputs, _, _ = axes = linear.sides(PRODUCTS[self.name])
        share = jnp.expand_dims(self._share(), _from_the_end(axes, inputs))
        return (LoRA.dense(self, jnp.float32) * share).astype(dtype)

    def _share(self):
        """m / |W + scale A B|."""
        return self.m / norms(self.name, jax.lax.stop_gradient(LoRA.dense(self, jnp.float32)))


def norms(name: str, w):
    """The norm over the inputs of a leaf, for every output: float32 [*stack, *groups, *outputs].

    >>> print(norms("up", jnp.array([[3.0, 0.0], [4.0, 2.0]])))
    [5. 2.]
    """
    axes = linear.sides(PRODUCTS[name])
    return jnp.sqrt(jnp.sum(jnp.square(linear.dense(w, jnp.float32)), _from_the_end(axes, axes.inputs)))


def _from_the_end(axes, letters):
    """Where these letters are in the weight, counted from behind, so that a stack in front may be there or not."""
    return tuple(axes.weight.index(letter) - len(axes.weight) for letter in letters)


def layout(part: str, name: str, spec) -> tuple:
    """How an adapter lies on a mesh where its weight lies so: each axis that both have alike, and ranks whole.

    Args:
      part: "a", "b" or "m".
      name: of the leaf.
      spec: an entry an axis of the weight, a stack's in front.

    >>> layout("a", "wq", (None, "fsdp", "tensor", None)), layout("b", "wq", (None, "fsdp", "tensor", None))
    ((None, 'fsdp', None), (None, None, 'tensor', None))
    """
    weight, inputs, outputs, groups = linear.sides(PRODUCTS[name])
    stack, of = spec[: len(spec) - len(weight)], dict(zip(weight[::-1], spec[::-1]))
    axes = {"a": f"{groups}{inputs}r", "b": f"{groups}r{outputs}", "m": f"{groups}{outputs}"}[part]
    return (*stack, *(of.get(letter) for letter in axes))


# ---- trees


def targeted(params, how: Adapter) -> dict:
    """The paths that are adapted, with the shapes of their weights.

    Args:
      params: the tree of a model; shapes (``jax.eval_shape``) do as well.
      how: the adapter.

    Raises:
      ValueError: a pattern matches no product of the model, or DoRA is asked for an embedding.
    """
    leaves = {path: w for path, w in flatten_dict(params).items() if path[-1] in PRODUCTS}
    if how.targets is None:
        names = ATTENTION if any(path[-1] == "router" for path in leaves) else BY_DEFAULT
        found = {path: w for path, w in leaves.items() if path[-1] in names}
    else:
        found = {p: w for p, w in leaves.items() if any(fnmatch.fnmatchcase(p[-1], t) for t in how.targets)}
    names = [path[-1] for path in leaves]
    for pattern in (*(how.targets or ()), *(pattern for pattern, _, _ in how.overrides)):
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"target {pattern!r} matches none of the products of this model: {', '.join(names)}")
    if how.dora and ("embed",) in found:
        raise ValueError(
            "target 'embed': DoRA is of products, and an embedding is looked up; leave it out, or use LoRA"
        )
    for path, w in found.items():
        if isinstance(w, LoRA):
            raise ValueError(f"params[{'/'.join(path)!r}] has an adapter already; fold it first")
    return {path: _shape(w) for path, w in found.items()}


def _shape(w):
    return jax.eval_shape(linear.dense, w).shape if isinstance(w, linear.Weight) else w.shape


def shapes(path, shape, how: Adapter) -> dict:
    """The arrays of one adapter and their shapes.

    Args:
      path: of the leaf in the tree.
      shape: of its weight.
      how: the adapter.

    >>> shapes(("layers", "wo"), (2, 4, 8, 32), Adapter(rank=3, dora=True))
    {'a': (2, 4, 8, 3), 'b': (2, 3, 32), 'm': (2, 32)}
    """
    weight, inputs, outputs, groups = linear.sides(PRODUCTS[path[-1]])
    stack, sizes = shape[: len(shape) - len(weight)], dict(zip(weight[::-1], shape[::-1]))
    rank, _ = how.of(path[-1])
    of = lambda letters: tuple(sizes[letter] for letter in letters)
    out = {"a": (*stack, *of(groups + inputs), rank), "b": (*stack, *of(groups), rank, *of(outputs))}
    return out | ({"m": (*stack, *of(groups + outputs))} if how.dora else {})


def init(key, params, how: Adapter) -> dict:
    """Fresh adapters: A random as in PEFT, B zero, DoRA's m the norms of the weights.

    A is uniform in +-1 / sqrt(number of inputs) (Kaiming with a = sqrt(5)), an embedding's normal with deviation 1. A
    target's A does not depend on which others there are.

    Args:
      key: PRNG key.
      params: the tree to adapt. Without DoRA only its shapes are looked at.
      how: the adapter.

    Returns:
      A tree of float32 arrays, to be trained.

    Raises:
      ValueError: as ``targeted``.
    """
    weights, out = flatten_dict(params), {}
    for path, shape in targeted(params, how).items():
        name, given = path[-1], shapes(path, shape, how)
        own = jax.random.fold_in(key, list(PRODUCTS).index(name))
        if name == "embed":
            a = jax.random.normal(own, given["a"])
        else:
            axes = linear.sides(PRODUCTS[name])
            bound = 1 / math.sqrt(math.prod(shape[i] for i in _from_the_end(axes, axes.inputs)))
            a = jax.random.uniform(own, given["a"], minval=-bound, maxval=bound)
        out[path] = {"a": a, "b": jnp.zeros(given["b"])} | ({"m": norms(name, weights[path])} if how.dora else {})
    return unflatten_dict(out)


def attach(params, adapters, how: Adapter) -> dict:
    """The model with its adapters beside its weights, as every function of a model takes it. Moves no data.

    Args:
      params: the tree of the model.
      adapters: of ``init``, or trained.
      how: the adapter.

    Returns:
      The same tree with a ``LoRA`` or ``DoRA`` in the place of each adapted weight.

    Raises:
      ValueError: an adapter is missing, has no weight, or has another shape than the weight asks for.
    """
    weights, given = flatten_dict(params), flatten_dict(adapters)
    left = dict(given)
    for path, shape in targeted(params, how).items():
        arrays = {name: left.pop((*path, name), None) for name in shapes(path, shape, how)}
        for name, expected in shapes(path, shape, how).items():
            have = None if arrays[name] is None else arrays[name].shape
            if have != expected:
                at = "/".join((*path, name))
                raise ValueError(
                    f"adapters[{at!r}] is {have or 'missing'}; the model and the adapter ask for {expected}"
                )
        node = DoRA if how.dora else LoRA
        weights[path] = node(w=weights[path], scale=how.scale(path[-1]), name=path[-1], **arrays)
    if left:
        raise ValueError(f"adapters[{'/'.join(min(left))!r}] is of nothing that {how} targets in this model")
    return unflatten_dict(weights)


def fold(params, adapters, how: Adapter) -> dict:
    """The adapted model with plain weights, computed in float32, in the types that they had.

    A quantised weight becomes float32. Arguments as ``attach``.
    """
    attached = flatten_dict(attach(params, adapters, how))

    def plain(node):
        dtype = jnp.float32 if isinstance(node.w, linear.Weight) else node.w.dtype
        return node.dense(dtype)

    return unflatten_dict({path: plain(w) if isinstance(w, LoRA) else w for path, w in attached.items()})


def adapted(loss_fn, how: Adapter):
    """A loss of the adapters alone, from a loss of a model.

    Args:
      loss_fn: ``(params, frozen, batch, key) -> (loss, metrics)``, such as of the recipes.
      how: the adapter.

    Returns:
      ``(adapters, (params, frozen), batch, key) -> (loss, metrics)``: the model's own weights are frozen, and go where
      the step takes what is frozen.
    """

    def loss_of_adapters(adapters, frozen, batch, key):
        params, rest = frozen
        return loss_fn(attach(params, adapters, how), rest, batch, key)

    return loss_of_adapters


def labels(adapters) -> dict:
    """Every array's name, "a", "b" or "m", for ``optax.multi_transform``: LoRA+ gives b a higher rate than a.

    Hayou et al. 2024, https://arxiv.org/abs/2402.12354, section 4: a ratio of 16 or so.

    >>> labels({"wq": {"a": 0.5, "b": 0.0}})
    {'wq': {'a': 'a', 'b': 'b'}}
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key, adapters)
