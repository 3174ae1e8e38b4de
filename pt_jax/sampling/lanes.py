"""Slots of a queue by the width of their cache: short texts in narrow ones, of which there are more."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pt_jax.sampling import penalties, rings

CHUNK = 4  # steps between two looks at which slots are free
NARROW = 64  # tokens that the first lane has room for, behind a prompt
LEAST = 4  # a part of the slots: no lane has fewer
AT_ONCE = 16  # a part of a lane's slots: so many are filled at a time


class Lane(NamedTuple):
    """``job`` [slots] is a slot's completion, that of sample job % G of prompt job // G; J where it has none."""

    cache: Any
    written: jax.Array  # columns of the cache, by all slots together
    job: jax.Array
    begun: jax.Array  # tokens that each slot had read before it drew any
    done: jax.Array  # tokens drawn by each slot
    token: jax.Array  # the last of each, not yet read
    alive: jax.Array
    history: penalties.History | None

    def of_slots(self, slots, cache):
        """The lane with some of its slots alone, and their cache."""
        return Lane(cache, self.written, *jax.tree.map(lambda x: x[slots], self[2:]))


def rooms_of(read: int, columns: int) -> list[int]:
    """How many columns the lanes have, the first for prompts of ``read`` and the last for all texts.

    >>> rooms_of(63, 575), rooms_of(500, 600)
    ([127, 254, 575], [600])
    """
    rooms, room = [], read + NARROW
    while 1.5 * room < columns:
        rooms.append(room)
        room *= 2
    return [*rooms, columns]


def slots_of(slots: int, lanes: int) -> list[int]:
    """How many slots the lanes have.

    >>> slots_of(32, 5), slots_of(3, 2)
    ([32, 16, 8, 8, 8], [3, 1])
    """
    return [max(slots >> at, slots // LEAST, 1) for at in range(lanes)]


def outgrown(lane, room):
    """[slots] bool, whose texts might not fit the lane any more at the next look."""
    return lane.alive & (lane.begun + lane.done + CHUNK > room)


def some(mask):
    """As many slots as are filled at a time: those that a mask shows come first."""
    return jnp.argsort(~mask, stable=True)[: max(len(mask) // AT_ONCE, 1)]


def filled(init_cache, lane, new, fresh, rows, turn):
    """A lane with those of other slots that are alive in its own ``rows``; see ``rings.inserted``."""
    rows = jnp.where(new.alive, rows, len(lane.alive))  # out of range: dropped
    cache = rings.inserted(lane.cache, new.cache, fresh, rows, init_cache, turn)
    put = lambda x, y: x.at[rows].set(y, mode="drop")
    return Lane(cache, lane.written, *jax.tree.map(put, lane[2:], new[2:]))


def moved(init_cache, lane, into, fresh, which, to):
    """Two lanes, after slots of one have gone to the other.

    Args:
      init_cache: of both.
      lane: where they come from.
      into: where they go, which is wider.
      fresh: an empty cache, as wide as the other's, of as many rows as go at a time.
      which: [slots] bool, of whom the first few go.
      to: where to; what is at work there stays.
    """
    rows = jnp.argsort(~which, stable=True)[: len(to)]
    moves = which[rows] & ~into.alive[to]
    cache = rings.widened(rings.taken(lane.cache, rows, init_cache), fresh, init_cache, lane.written)
    new = lane.of_slots(rows, cache)._replace(alive=moves)
    into = filled(init_cache, into, new, fresh, to, into.written - lane.written)
    return lane._replace(alive=lane.alive.at[rows].min(~moves)), into


def at_work(init_cache, lane, few):
    """The slots that still work, of which there are no more than ``few``."""
    slots = jnp.argsort(~lane.alive, stable=True)[:few]
    return lane.of_slots(slots, rings.taken(lane.cache, slots, init_cache))
