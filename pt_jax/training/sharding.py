"""Where arrays live: one mesh of five axes, one table of layouts by leaf name.

    data      splits the rows of a batch
    fsdp      splits the rows of a batch and, to save memory, every weight
    tensor    splits heads, hidden units and the vocabulary
    context   splits the tokens of a row
    expert    splits the experts of a mixture, and the rows of a batch

Parameters, gradients and the optimiser's moments share the last name on their paths, so one table serves a whole
``TrainState``. Axis 0 of a layer's weight is the stack of layers and is not split. An adapter's arrays lie as their
weight does, axis by axis. What splits a weight must divide it, with one exception: a vocabulary that ``tensor`` does
not divide stays whole, since its size is the tokenizer's (``models.vocabulary.resize`` makes it divide).

    mesh = make_mesh(fsdp=4, context=2)
    layout = by_name(state, mesh)
    state, batch = place(state, layout), place(batch, of_batch(batch, mesh))
    step = make_train_step(within(mesh, loss_fn), optimizer, shardings=layout)
"""

import functools
import math

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pt_jax.models import lora, parameters
from pt_jax.tracking import tables

AXES = ("data", "fsdp", "expert", "context", "tensor")  # the last are the nearest neighbours: they talk most
ROWS = P(("data", "fsdp", "expert"))

LAYOUT = {
    "embed": P("tensor", "fsdp"),
    "unembed": P("tensor", "fsdp"),
    "positions": P(None, "fsdp"),
    "wq": P(None, "fsdp", "tensor", None),
    "wk": P(None, "fsdp", "tensor", None),
    "wv": P(None, "fsdp", "tensor", None),
    "wo": P(None, "tensor", None, "fsdp"),
    "gate": P(None, "fsdp", "tensor"),
    "up": P(None, "fsdp", "tensor"),
    "down": P(None, "tensor", "fsdp"),
    "router": P(None, "fsdp", None),
    "expert_gate": P(None, "expert", "fsdp", "tensor"),
    "expert_up": P(None, "expert", "fsdp", "tensor"),
    "expert_down": P(None, "expert", "tensor", "fsdp"),
    "shared_gate": P(None, "fsdp", "tensor"),
    "shared_up": P(None, "fsdp", "tensor"),
    "shared_down": P(None, "tensor", "fsdp"),
    "wq_bias": P(None, "tensor", None),
    "wk_bias": P(None, "tensor", None),
    "wv_bias": P(None, "tensor", None),
    "gate_bias": P(None, "tensor"),
    "up_bias": P(None, "tensor"),
    "shared_gate_bias": P(None, "tensor"),
    "shared_up_bias": P(None, "tensor"),
}
CACHE = {
    "k": P(None, ROWS[0], "tensor"),
    "v": P(None, ROWS[0], "tensor"),
    "k_scale": P(None, ROWS[0], "tensor"),
    "v_scale": P(None, ROWS[0], "tensor"),
    "position": ROWS,
    "count": ROWS,
    "routes": P(None, ROWS[0]),
}


def make_mesh(data: int | None = None, fsdp: int = 1, tensor: int = 1, *, context: int = 1, expert: int = 1):
    """A mesh of all devices with Auto axes: the compiler places the collectives.

    Args:
      data: devices along this axis; when None, as many as the others leave over.
      fsdp, tensor, context, expert: likewise.

    Raises:
      ValueError: the product is not the number of devices.
    """
    shape = sizes(jax.device_count(), data=data, fsdp=fsdp, tensor=tensor, context=context, expert=expert)
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def planned_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, *, context: int = 1, expert: int = 1):
    """A mesh of devices that are not there, for ``by_name`` and ``table``."""
    given = {"data": data, "fsdp": fsdp, "tensor": tensor, "context": context, "expert": expert}
    shape = sizes(math.prod(given.values()), **given)
    return AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def sizes(devices: int, *, data: int | None = None, fsdp=1, tensor=1, context=1, expert=1) -> dict:
    """The size of each axis of a mesh for so many devices, in the mesh's order.

    >>> sizes(8, fsdp=2, context=2)
    {'data': 2, 'fsdp': 2, 'expert': 1, 'context': 2, 'tensor': 1}
    """
    given = {"fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}
    for name, size in {"data": 1 if data is None else data, **given}.items():
        if size < 1:
            raise ValueError(f"mesh axis {name} must have at least 1 device, got {size}")
    rest = math.prod(given.values())
    if data is None and devices % rest:
        raise ValueError(f"mesh {_named(given)} asks for multiples of {rest} devices, there are {devices}")
    shape = {"data": devices // rest if data is None else data} | given
    if math.prod(shape.values()) != devices:
        raise ValueError(f"mesh {_named(shape)} asks for {math.prod(shape.values())} devices, there are {devices}")
    return shape


def _named(shape) -> str:
    return " x ".join(f"{name}={size}" for name, size in shape.items() if size > 1) or "of one device"


def by_name(tree, mesh, layout=None):
    """A sharding for every leaf of a tree, by the last name on its path; what has no row in the table is replicated.

    Args:
      tree: arrays or shapes: parameters, a ``TrainState``, gradients; with ``layout=CACHE`` a cache.
      mesh: from ``make_mesh``, or ``planned_mesh``.
      layout: name to PartitionSpec; ``LAYOUT`` when None.

    Raises:
      ValueError: an axis of the mesh does not divide the axis of an array that it would split.
    """
    layout = LAYOUT if layout is None else layout

    def one(path, leaf):
        spec = _spec(path, leaf, layout, mesh)
        for i, axis in enumerate(spec):
            if axis is not None and leaf.shape[i] % _size(mesh, axis):
                raise ValueError(_does_not_divide(mesh, axis, i, _name(path), leaf.shape[i]))
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, tree)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _size(mesh, axis) -> int:
    """Devices along an entry of a spec: one axis of the mesh, or several together."""
    return math.prod(mesh.shape.get(name, 1) for name in (axis if isinstance(axis, tuple) else (axis,)))


def _does_not_divide(mesh, axis, i, name, length) -> str:
    names = [x for x in (axis if isinstance(axis, tuple) else (axis,)) if mesh.shape.get(x, 1) > 1]
    said = " x ".join(f"{x}={mesh.shape[x]}" for x in names)
    best = math.gcd(_size(mesh, axis), length)
    return (
        f"mesh axis {said} does not divide axis {i} of {name}, which is {length}; "
        f"choose {names[0] if len(names) == 1 else 'a product'} of {best} or another divisor of {length}"
    )


def _spec(path, leaf, layout, mesh):
    """The row of a leaf; of a part of a record (``models.lora``, ``models.quantize``), made from the row of the weight.

    Scales of quantised weights are small, and whole along an axis that does not divide.
    """
    names = [getattr(entry, "key", getattr(entry, "name", None)) for entry in path]
    known = [i for i, name in enumerate(names) if name in layout]
    if not known:
        return P()
    spec, name, parts = layout[names[known[-1]]], names[known[-1]], names[known[-1] + 1 :]
    parts = parts[1:] if parts[:1] == ["w"] else parts
    if parts in (["a"], ["b"], ["m"]) and name in parameters.PRODUCTS:
        spec = P(*lora.layout(parts[0], name, spec))
    elif parts[:1] in (["scale"], ["absmax"]):
        spec = _whole_where(spec, leaf, mesh, lambda axis: True)
    elif parts not in ([], ["values"], ["packed"]):
        return P()
    if leaf.ndim < len(spec):
        return P()
    return _whole_where(spec, leaf, mesh, lambda axis: axis == "tensor") if name in VOCABULARY else spec


VOCABULARY = ("embed", "unembed")  # whose axis of ``tensor`` is as long as the tokenizer wants it


def _whole_where(spec, leaf, mesh, may):
    """A spec without the axes that may be left out and do not divide."""
    keep = lambda i, axis: axis is None or not may(axis) or leaf.shape[i] % _size(mesh, axis) == 0
    return P(*(axis if keep(i, axis) else None for i, axis in enumerate(spec[: leaf.ndim])))


def rows(mesh):
    """For arrays with the rows of a batch in front: the leading axis over data, fsdp and expert."""
    return NamedSharding(mesh, P(_rows(mesh)))


def _rows(mesh):
    return tuple(axis for axis in ROWS[0] if axis in mesh.shape)


def of_batch(batch, mesh):
    """A sharding for every leaf of a training batch: rows over data, fsdp and expert, tokens over context.

    The tokens of a row are the first axis after the rows that is as long as that of the batch's ``tokens``; of a tree
    without these, only rows are split.

    Args:
      batch: of a recipe, arrays or shapes.
      mesh: from ``make_mesh``.

    Raises:
      ValueError: rows or tokens do not divide over the mesh.
    """
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    length = next((x.shape[1] for path, x in leaves if getattr(path[-1], "key", None) == "tokens"), None)
    context = mesh.shape.get("context", 1)

    def one(path, leaf):
        at = next((i for i in range(1, leaf.ndim) if context > 1 and leaf.shape[i] == length), None)
        spec = P(_rows(mesh)) if at is None else P(_rows(mesh), *[None] * (at - 1), "context")
        for i, axis, what in ((0, spec[0], "rows"), *(() if at is None else ((at, "context", "tokens a row"),))):
            count = _size(mesh, axis)
            if leaf.shape[i] % count:
                named = _named({x: mesh.shape[x] for x in (axis if isinstance(axis, tuple) else (axis,))})
                raise ValueError(
                    f"batch.{_name(path)} has {leaf.shape[i]} {what}, which {named} does not divide; "
                    f"choose a multiple of {count}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, batch)


def place(tree, shardings):
    """The arrays of a tree where their shardings want them, on the devices of one process or of several.

    Args:
      tree: numpy or JAX arrays; what is not spread over processes yet must be the same on each of them.
      shardings: one for all, or a tree of them.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(_placed, tree, shardings)


def _placed(x, sharding):
    if sharding.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_placed(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
    x = np.asarray(x)  # device_put would send all of it around first, to see whether it is the same everywhere
    return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])


@functools.cache
def within(mesh, fn):
    """``fn``, told of the mesh while it is traced, as ``jax.set_mesh`` would tell it.

    The models ask for it where the compiler alone would not split the work: attention by a kernel or over tokens that
    lie on several devices, mixtures of experts, and weights that ``fsdp`` splits, which are then put together for each
    product. A sampler is better off without, unless it has experts: where a step reads a token a row, sums of hidden
    states are less to send than weights, and the compiler sends them. The same arguments give the same function, so
    nothing is traced twice.

    Args:
      mesh: from ``make_mesh``.
      fn: a loss, or ``apply`` of a model; it is called under ``jax.jit``.
    """

    @functools.wraps(fn)
    def told(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return fn(*args, **kwargs)

    return told


def table(tree, mesh, layout=None):
    """What lives where, and how many bytes of it on each device, as a table for the terminal.

    Args:
      tree: arrays or shapes: parameters, or a ``TrainState``, of which every parameter has a line and each other part
        one for all of its leaves.
      mesh: from ``make_mesh``, or ``planned_mesh``.
      layout: as of ``by_name``.

    Returns:
      A ``rich`` table.

    Raises:
      ValueError: see ``by_name``.

    >>> params = {"embed": jax.ShapeDtypeStruct((259, 64), "float32"), "norm": jax.ShapeDtypeStruct((64,), "float32")}
    >>> print(tables.text(table(params, planned_mesh(fsdp=4, tensor=2)), 90))
                             mesh fsdp=4 x tensor=2, 8 devices
    <BLANKLINE>
      array      shape     split over                                bytes   a device
     ─────────────────────────────────────────────────────────────────────────────────
      embed      259, 64   -, fsdp; 259 do not divide over tensor   66,304     16,576
      norm       64        -                                           256        256
      together                                                      66,560     16,832
    <BLANKLINE>
    """
    lines = {}
    places = jax.tree.leaves(by_name(tree, mesh, layout))
    for (path, leaf), place in zip(jax.tree_util.tree_leaves_with_path(tree), places):
        name = _name(path)
        alone = not hasattr(tree, "params") or name.startswith("params.")
        line = lines.setdefault(
            name.removeprefix("params.") if alone else name.split(".")[0],
            {"shape": "", "spec": "", "whole": 0, "mine": 0},
        )
        if alone:
            line |= {"shape": ", ".join(map(str, leaf.shape)), "spec": _said(name, leaf, place.spec, mesh)}
        line["whole"] += leaf.size * leaf.dtype.itemsize
        line["mine"] += math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    rows = [[name, *line.values()] for name, line in lines.items()]
    rows.append(["together", "", "", *(sum(row[i] for row in rows) for i in (3, 4))])
    title = f"mesh {_named(mesh.shape)}, {mesh.size} devices" if mesh.size > 1 else "one device"
    return tables.table(title, ["array", "shape", "split over", "bytes", "a device"], rows)


def _said(name, leaf, spec, mesh) -> str:
    """A spec in words, axis by axis as far as something is split."""
    split = [None if axis is None or _size(mesh, axis) == 1 else axis for axis in spec]
    while split and split[-1] is None:
        split.pop()
    said = ", ".join("-" if axis is None else " x ".join((axis,) if isinstance(axis, str) else axis) for axis in split)
    if mesh.shape.get("tensor", 1) > 1 and name.split(".")[-1] in VOCABULARY and "tensor" not in spec:
        said += f"; {leaf.shape[0]} do not divide over tensor"
    return said or "-"
