"""Where arrays live: one mesh of three axes, one table of layouts by leaf name.

    data     splits the rows of a batch
    fsdp     splits the rows of a batch and, to save memory, every weight
    tensor   splits heads, hidden units and the vocabulary

Parameters, gradients and the optimiser's moments share the last name on their paths, so one table serves a whole
``TrainState``. Axis 0 of a layer's weight is the stack of layers and is not split. An adapter's arrays lie as their
weight does, axis by axis.
"""

import math

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pt_jax.models import lora, parameters

AXES = ("data", "fsdp", "tensor")
ROWS = P(("data", "fsdp"))

LAYOUT = {
    "embed": P("tensor", "fsdp"),
    "unembed": P("tensor", "fsdp"),
    "wq": P(None, "fsdp", "tensor", None),
    "wk": P(None, "fsdp", "tensor", None),
    "wv": P(None, "fsdp", "tensor", None),
    "wo": P(None, "tensor", None, "fsdp"),
    "gate": P(None, "fsdp", "tensor"),
    "up": P(None, "fsdp", "tensor"),
    "down": P(None, "tensor", "fsdp"),
    "wq_bias": P(None, "tensor", None),
    "wk_bias": P(None, "tensor", None),
    "wv_bias": P(None, "tensor", None),
    "gate_bias": P(None, "tensor"),
    "up_bias": P(None, "tensor"),
}


def make_mesh(data: int, fsdp: int = 1, tensor: int = 1):
    """A mesh of (data, fsdp, tensor) devices with Auto axes: the compiler places the collectives.

    Raises:
      ValueError: the product is not the number of devices.
    """
    shape = (data, fsdp, tensor)
    if math.prod(shape) != jax.device_count():
        sizes = " x ".join(f"{name}={n}" for name, n in zip(AXES, shape))
        raise ValueError(f"mesh {sizes} asks for {math.prod(shape)} devices, there are {jax.device_count()}")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)


def by_name(tree, mesh, layout=None):
    """A sharding for every leaf of a tree, by the last name on its path; what has no row in the table is replicated.

    Args:
      tree: arrays or shapes: parameters, a ``TrainState``, gradients.
      mesh: from ``make_mesh``.
      layout: name to PartitionSpec; ``LAYOUT`` when None.

    Raises:
      ValueError: an axis of the mesh does not divide the axis of an array that it would split.
    """
    layout = LAYOUT if layout is None else layout

    def one(path, leaf):
        spec = _spec(path, leaf, layout, mesh)
        for i, axis in enumerate(spec):
            if axis is not None and leaf.shape[i] % mesh.shape[axis]:
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise ValueError(
                    f"mesh axis {axis}={mesh.shape[axis]} does not divide axis {i} of {name}, which is {leaf.shape[i]}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, tree)


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
        fits = lambda i, axis: axis is not None and leaf.shape[i] % mesh.shape[axis] == 0
        spec = P(*(axis if fits(i, axis) else None for i, axis in enumerate(spec)))
    elif parts not in ([], ["values"], ["packed"]):
        return P()
    return spec if leaf.ndim >= len(spec) else P()


def rows(mesh):
    """For a batch: the leading axis over data and fsdp."""
    return NamedSharding(mesh, ROWS)
