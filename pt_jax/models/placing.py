"""Arrays that are filled on their devices, piece by piece, so that the host never holds one whole."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

CHUNK = 2**21  # bytes on their way to devices


def default_sharding():
    """Of what nobody placed."""
    return SingleDeviceSharding(jax.config.jax_default_device or jax.local_devices()[0])


class Filling:
    """An array of zeros whose parts are put in place one after the other.

    Each device is given its own share of each part and no more, in pieces that are together of ``CHUNK`` bytes. That is
    why until the end the shares lie side by side along the first axis of another array, whatever their sharding: an
    update of the array itself would send every part to every device.

    Args:
      shape: of the array.
      dtype: of the array; parts are cast on the host.
      sharding: or None: the default device.
    """

    def __init__(self, shape, dtype, sharding=None):
        self.sharding = default_sharding() if sharding is None else sharding
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        places = self.sharding.addressable_devices_indices_map(self.shape)
        self.places = [[slice(*x.indices(n)) for x, n in zip(place, self.shape)] for place in places.values()]
        self.mesh = Mesh(np.array(list(places)), "device", axis_types=(AxisType.Auto,))
        self.side_by_side = NamedSharding(self.mesh, P("device"))
        first, *rest = self.sharding.shard_shape(self.shape)
        self.shares = jnp.zeros((len(places) * first, *rest), self.dtype, device=self.side_by_side)

    def put(self, part, at=()):
        """Puts a part at the indices ``at`` of the leading axes; of what lies on none of the devices, nothing is read.

        Args:
          part: a numpy array, or what reads one when it is indexed by slices (``tensors.Leaf``).
          at: the layer, and the expert.
        """
        here = np.array([all(x.start <= i < x.stop for i, x in zip(at, place)) for place in self.places])
        if not here.any():
            return
        held = [place[len(at) :] for place in self.places]
        held = [x if has else held[here.argmax()] for x, has in zip(held, here)]  # who has none of it is sent another's
        ends = [(min(x.start for x in axis), max(x.stop for x in axis)) for axis in zip(*held)]
        part = part[tuple(slice(*end) for end in ends)]
        mine = [part[tuple(slice(i.start - low, i.stop - low) for i, (low, _) in zip(x, ends))] for x in held]
        start = np.zeros((len(mine), len(self.shape)), np.int32)
        start[:, : len(at)] = [
            [i - x.start if x.start <= i < x.stop else 0 for i, x in zip(at, p)] for p in self.places
        ]
        row = max(1, sum(x[:1].size for x in mine) * self.dtype.itemsize)
        for begin in range(0, len(mine[0]), rows := max(1, CHUNK // row)):
            pieces = np.stack([x[begin : begin + rows] for x in mine], dtype=self.dtype, casting="unsafe")
            start[:, len(at)] = begin
            sent = jax.device_put((pieces, start, None if here.all() else here), self.side_by_side)
            # waited for: what is on its way takes room as well
            self.shares = _updated(self.shares, *sent, mesh=self.mesh).block_until_ready()

    def array(self):
        """The array."""
        shares = [shard.data for shard in self.shares.addressable_shards]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, shares)


@partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def _updated(shares, pieces, start, here, mesh):
    def update(share, piece, start, here):
        piece = piece.reshape((1,) * (share.ndim - piece.ndim + 1) + piece.shape[1:])
        start = [start[0, i] for i in range(share.ndim)]
        if here is not None:
            piece = jnp.where(here.reshape((1,) * share.ndim), piece, jax.lax.dynamic_slice(share, start, piece.shape))
        return jax.lax.dynamic_update_slice(share, piece, start)

    return jax.shard_map(update, mesh=mesh, in_specs=P("device"), out_specs=P("device"))(shares, pieces, start, here)
