"""What a model asks of the mesh that it is computed on: which of its axes split what.

    tensor    heads, hidden units, the vocabulary
    context   the tokens of a row
    expert    the experts of a mixture, and rows
    fsdp      weights, to save memory, and rows
    others    rows

The compiler splits a model by itself, wherever it is told that arrays lie. Two things it does not split as it should:
attention over tokens that lie on several devices, or by a kernel, and mixtures of experts, whose rows it would sort all
together. Those are written device by device, when the mesh is known: from ``jax.set_mesh``, or from
``training.sharding.within``. Axes that somebody else's ``shard_map`` has taken over are none of theirs.
"""

import math

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

NO_ROWS = ("tensor", "context")


def sizes() -> dict:
    """Axes of the mesh and how many devices lie along each; none where no mesh is known, or only one device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return {}
    return dict(mesh.shape)


def size(axis: str) -> int:
    """Devices along an axis of the mesh; 1 where there is none."""
    return sizes().get(axis, 1)


def splits(axis: str, length: int):
    """The axis as an entry of a PartitionSpec; None where there is none, or it does not divide so many."""
    return axis if axis in sizes() and length % size(axis) == 0 else None


def rows(count: int):
    """The axes that split rows as an entry of a PartitionSpec; None where they do not divide so many."""
    axes = {axis: n for axis, n in sizes().items() if axis not in NO_ROWS}
    return tuple(axes) if axes and count % math.prod(axes.values()) == 0 else None


def apart(length: int) -> bool:
    """Whether the tokens of rows of this length lie on several devices."""
    return size("context") > 1 and length % size("context") == 0


def deals(length: int) -> bool:
    """Whether the tokens of such rows can be dealt out: the same number from each device to each, and an even one."""
    return apart(length) and length % (2 * size("context") ** 2) == 0


def dealt(x, axis: int):
    """Tokens on this axis in the order in which their queries are dealt out, each device's side by side.

    Of n devices, each gets an n-th of the tokens of each, in order. So all have as much to see, and the i-th n-th of
    what a device has sees no token that does not lie on one of the first i devices.
    """
    n, shape = size("context"), x.shape
    x = x.reshape(*shape[:axis], n, n, -1, *shape[axis + 1 :]).swapaxes(axis, axis + 1).reshape(shape)
    return jax.lax.with_sharding_constraint(x, P(rows(shape[0]), *[None] * (axis - 1), "context"))


def laid(x):
    """Hidden states [B, T, ...] with rows and tokens on the devices that have them, and whole along all other axes.

    Else the compiler may lay them as the weights lie, split along their width by ``fsdp``: then every device computes
    a part of every row, and sums of hidden states travel instead of weights.
    """
    if not sizes():
        return x
    return jax.lax.with_sharding_constraint(x, P(rows(x.shape[0]), splits("context", x.shape[1])))


def gathered_weight(w, axis: str):
    """A matrix [axis, width] such as an embedding, put together from what ``fsdp`` splits."""
    return jax.lax.with_sharding_constraint(w, P(splits(axis, w.shape[0]))) if sizes() else w


def on_each(fn, in_specs, out_specs):
    """``fn`` of each device's own parts."""
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def gathered(x, axis, at):
    """Within ``on_each``, the parts of all devices along an axis of the mesh, one behind the other on axis ``at``."""
    return x if axis is None else jax.lax.all_gather(x, axis, axis=at, tiled=True)
