"""Arrays that are filled on their devices, piece by piece, so that the host never holds one whole."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

CHUNK = 2**21  # bytes on their way to a device


def default_sharding():
    """Of what nobody placed."""
    return SingleDeviceSharding(jax.config.jax_default_device or jax.local_devices()[0])


class Filling:
    """An array of zeros whose parts are put in place one after the other.

    Each device is given its own share of each part and no more, in pieces of ``CHUNK`` bytes. That is why the shares
    are arrays of their own until the end: an update of the whole would send every part to every device.

    Args:
      shape: of the array.
      dtype: of the array; parts are cast on the host.
      sharding: or None: the default device.
    """

    def __init__(self, shape, dtype, sharding=None):
        sharding = default_sharding() if sharding is None else sharding
        self.shape, self.dtype, self.sharding = tuple(shape), np.dtype(dtype), sharding
        self.places = sharding.addressable_devices_indices_map(self.shape)
        share = sharding.shard_shape(self.shape)
        self.shares = {device: jnp.zeros(share, dtype, device=device) for device in self.places}

    def put(self, part, at=()):
        """Puts a numpy array at the indices ``at`` of the leading axes."""
        for device, place in self.places.items():
            place = [slice(*x.indices(n)) for x, n in zip(place, self.shape)]
            if all(x.start <= i < x.stop for i, x in zip(at, place)):
                lead = tuple(i - x.start for i, x in zip(at, place))
                self._put(device, part[tuple(place[len(at) :])], lead)

    def _put(self, device, part, lead):
        rows = max(1, CHUNK // max(1, part[:1].size * self.dtype.itemsize))
        for begin in range(0, len(part), rows):
            piece = np.ascontiguousarray(part[begin : begin + rows], self.dtype)
            start = (*lead, begin, *[0] * (part.ndim - 1))
            # waited for: what is on its way takes room as well
            self.shares[device] = _updated(
                self.shares[device], jax.device_put(piece, device), start
            ).block_until_ready()

    def array(self):
        """The array."""
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, list(self.shares.values()))


@partial(jax.jit, donate_argnums=0)
def _updated(share, piece, start):
    piece = piece.reshape((1,) * (share.ndim - piece.ndim) + piece.shape)
    return jax.lax.dynamic_update_slice(share, piece, start)
