"""What a decoder remembers of the tokens before: keys and values, and where each stands in its row's text.

    k          [L, B, k, c, S]: the same number of all of a head's keys side by side, and
    v          [L, B, k, S, c]: as a product with one query a head reads them fastest
    position   [B, S] int32 of each key in its text, -1 where none is seen
    count      [B] int32, tokens seen so far: the position of the next
    end        int32, columns written so far; the next one is written to column end mod S
    room       [N, 0]: no numbers, but a first axis: how many tokens the cache is for, whatever S is now
    longest    [N, 0]: in the same way, the most tokens of a text; of a model that has learned its positions
    routes     [M, B, S, K] int32, which experts the M layers that have them chose; of a model with experts
    near       k, v and position of the layers that see a window alone, in R columns: a ring of the last tokens; and
               slack [n, 0], how many columns may be forgotten
    prefix     None, or the cache of P rows that each stand in front of B / P rows, one after the other: the rows go on
               from there, and what they share is there once. It is read, and never written

L are the layers that see all of a text; k and v are missing where there are none, and near where all are such. Of a
cache by layer they are tuples of L arrays [B, ...]: what is read is not copied out of a stack before.

In int8 a key or value of a head is 127 parts of its largest number: ``k_scale`` and ``v_scale`` [L, B, k, S] float32
say how large a part is. A token is rounded when it is written and never again, and what is read is what was written,
by the tokens that are written with it, too: so a text has the same numbers however it is cut into calls. But where a
number lies between two parts, the last bits of float32 decide which it becomes: another batch, or another engine, may
round a few otherwise, and then log-probabilities agree to about 1e-3, and a sample may be another.

Who sees whom is a matter of positions, not of columns: rows may lie in a cache at different places, and one that begins
anew overwrites the oldest columns. A ring keeps columns: of a row in which padding follows tokens and tokens follow the
padding it may lose some that a window still shows. Of a token that does not see all of its window there is no number.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pt_jax.models.config import CACHES, Config
from pt_jax.models.visibility import Sight

SLACK = 16  # columns of a ring beyond its window: as many may be forgotten
TOKENS = {"k": -1, "v": -2, "k_scale": -1, "v_scale": -1}  # the axis of the columns


def init_cache(
    config: Config, rows: int, length: int, dtype=jnp.float32, *, by_layer: bool = False, slack: int = SLACK
) -> dict:
    """An empty cache for ``length`` tokens of ``rows`` rows.

    Args:
      config: the model.
      rows: B.
      length: S.
      dtype: of keys and values: float32, bfloat16, float16; or int8, of a quarter of float32's size and 4 bytes more a
        head and token. Then texts are sampled from a slightly other model than the trainer's: a log-probability is
        the trainer's to about 1e-2, not to 1e-5, and a replay's (``sample(..., forced=...)``) to the last bit as ever.
      by_layer: each layer's keys and values as arrays of their own, beside weights of ``models.by_layer``.
      slack: how many columns of a ring may be forgotten (``forget``).

    Raises:
      ValueError: there is no cache of that type.

    >>> config = Config(vocab=8, layers=3, width=8, heads=2, kv_heads=1, head_width=4, hidden=8, windows=(5, 0, 5))
    >>> cache = init_cache(config, 2, 100, jnp.int8)
    >>> cache["k"].shape, cache["k_scale"].shape, cache["near"]["k"].shape
    ((1, 2, 1, 4, 100), (1, 2, 1, 100), (2, 2, 1, 4, 21))
    """
    if jnp.dtype(dtype).name not in CACHES:
        raise ValueError(f"there is no cache of type {jnp.dtype(dtype).name}; known are {', '.join(CACHES)}")
    near = sum(map(bool, config.windows))
    empty = _empty_by_layer if by_layer else _empty
    of = lambda layers, columns: empty(config, layers, rows, columns, dtype) if layers else {}
    cache = of(config.layers - near, length) | {
        "position": jnp.full((rows, length), -1, jnp.int32), "count": jnp.zeros(rows, jnp.int32),
        "end": jnp.int32(0), "room": jnp.zeros((length, 0)), "prefix": None,
    }  # fmt: skip
    if near:
        ring = min(length, max(config.windows) + slack)
        cache["near"] = of(near, ring) | {"position": jnp.full((rows, ring), -1, jnp.int32)}
        cache["near"]["slack"] = jnp.zeros((slack, 0))
    if config.learned_positions:
        cache["longest"] = jnp.zeros((config.max_length, 0))
    if config.experts:
        shape = (sum(config.has_experts), rows, length, config.experts_per_token)
        cache["routes"] = jnp.zeros(shape, jnp.int32)
    return cache


def _empty(config, layers, rows, columns, dtype):
    heads, width = (layers, rows, config.kv_heads), config.head_width
    out = {"k": jnp.zeros((*heads, width, columns), dtype), "v": jnp.zeros((*heads, columns, width), dtype)}
    if jnp.dtype(dtype) == jnp.int8:
        out |= {name: jnp.zeros((*heads, columns)) for name in ("k_scale", "v_scale")}
    return out


def _empty_by_layer(config, layers, *sizes):
    """The same as tuples of each layer's."""
    each = [_empty(config, 1, *sizes) for _ in range(layers)]
    return {name: tuple(x[name][0] for x in each) for name in each[0]}


def stacks(cache) -> dict[str, dict]:
    """Keys, values and scales by kind of layer, "far" or "near": what the layers write, or of a prefix, read."""
    pick = lambda tree: {name: tree[name] for name in TOKENS if name in tree}
    return {"far": pick(cache), "near": pick(cache.get("near", {}))}


def with_stacks(cache, changed) -> dict:
    """The cache with other keys, values and scales, as ``stacks`` gives them."""
    near = {"near": cache["near"] | changed["near"]} if "near" in cache else {}
    return cache | changed["far"] | near


def is_by_layer(cache) -> bool:
    """Whether each layer's keys and values are arrays of their own."""
    return any(isinstance(x, tuple) for kind in stacks(cache).values() for x in kind.values())


class Place(NamedTuple):
    """Where new tokens go in the layers of a kind.

    Args:
      start: the column of the first, and the others behind it; None in a ring that several tokens are written to.
      columns: of the last of them in such a ring, int32; None otherwise.
      before: whether what is in the ring is read beside what is written.
      sights: of the tokens on each of the parts that ``append`` returns.
    """

    start: jax.Array | None
    columns: jax.Array | None
    before: bool
    sights: tuple[Sight, ...]


class Begun(NamedTuple):
    """What ``begin`` finds.

    Args:
      position: [B, T] int32 of the new tokens in their texts.
      start: the column of the first.
      places: a ``Place`` by kind of layer.
      lost: [B, T] bool, tokens whose window is not there whole; None where nothing can be lost.
    """

    position: jax.Array
    start: jax.Array
    places: dict[str, Place]
    lost: jax.Array | None


def begin(config: Config, cache, seen) -> tuple[Begun, dict]:
    """Makes room for tokens.

    Args:
      config: the model.
      cache: see above.
      seen: [B, T] bool, which of the new tokens are no padding.

    Returns:
      Where they go and what they see, and the cache that knows their positions.

    Raises:
      ValueError: there are more tokens than the cache has columns, or the rows cannot go on from their prefix.
    """
    T, S = seen.shape[1], cache["position"].shape[1]
    if T > S:
        raise ValueError(f"{T} tokens do not fit a cache for {S}; give init_cache the length of prompt and answer")
    prefix, end = cache["prefix"], cache["end"]
    if T > 1 and not isinstance(end, jax.core.Tracer) and int(end) + T > S:
        raise ValueError(f"{T} tokens do not fit behind the {int(end)} in a cache for {S}; give init_cache more length")
    if prefix is not None:
        _check_prefix(prefix, len(seen))
    count = cache["count"][:, None] + jnp.cumsum(seen, 1)
    each = None if prefix is None else len(seen) // len(prefix["count"])
    position = jnp.maximum(count - 1 if prefix is None else count - 1 + jnp.repeat(prefix["count"], each)[:, None], 0)
    mine = jnp.where(seen, position, -1)
    in_front = lambda tree: () if prefix is None else (_sight(position, jnp.repeat(tree["position"], each, 0)),)
    # one column may be written anywhere, several must not be torn: they are appended
    start = end % S if T == 1 else end
    keys = jax.lax.dynamic_update_slice(cache["position"], mine, (0, start))
    places = {"far": Place(start, None, True, (*in_front(prefix), _sight(position, keys)))}
    after = cache | {"position": keys, "count": count[:, -1], "end": end + T}
    lost = None
    if "near" in cache:
        place, ring = _in_ring(cache["near"]["position"], mine, position, end, S)
        places["near"] = place._replace(sights=(*in_front(prefix and prefix["near"]), *place.sights))
        after["near"] = cache["near"] | {"position": ring}
        stored = [cache] if prefix is None else [cache, prefix]
        if any(x["near"]["position"].shape[1] < x["position"].shape[1] for x in stored):
            window = max(config.windows)
            there = sum((x.visible & (x.behind < window)).sum(3, dtype=jnp.int32) for x in places["near"].sights)
            lost = seen & (there[:, 0] < jnp.minimum(position + 1, window))
    return Begun(position, start, places, lost), after


def _check_prefix(prefix, rows):
    if rows % len(prefix["count"]):
        raise ValueError(f"{rows} rows cannot go on from a prefix of {len(prefix['count'])}: each is of as many rows")
    if prefix["prefix"] is not None:
        raise ValueError("the prefix of the cache has a prefix itself; read both as one")


def _sight(position, keys):
    """What tokens at these positions [B, T] see of keys at those [B, S], windows aside."""
    query, keys = position[:, None, :, None], keys[:, None, None]
    return Sight(position, (keys >= 0) & (keys <= query), query - keys)


def _in_ring(ring, mine, position, end, length):
    """The ``Place`` of new tokens in a ring, and its positions [B, R] with theirs; ``length`` is S of the cache."""
    T, R = mine.shape[1], ring.shape[1]
    if T == 1 or length == R:  # one token takes the place of the oldest; and a ring as long as the cache is none
        start = end % R if T == 1 else end
        ring = jax.lax.dynamic_update_slice(ring, mine, (0, start))
        return Place(start, None, True, (_sight(position, ring),)), ring
    # several see what they overwrite: what was there is read beside them, unless they fill the whole cache
    before = (_sight(position, ring),) if length > T else ()
    last = np.arange(T)[-R:]
    columns = (end + last) % R if before else jnp.asarray(last % R)
    place = Place(None, columns, bool(before), (*before, _sight(position, mine)))
    return place, ring.at[:, columns].set(mine[:, -R:], unique_indices=True)


def append(stack, layer, k, v, place: Place, prefix=None):
    """Keys and values of a layer with new ones in their columns.

    Args:
      stack: of ``stacks``; it should be a loop's own, to be changed in place.
      layer: which of the stack's; an int where each has arrays of its own.
      k, v: [B, T, k, c], the new ones.
      place: where they go.
      prefix: the same kind's stack of the cache in front, or None.

    Returns:
      The stack, and the parts that the tokens may see: k [B, k, c, S], v [B, k, S, c] and their scales, each.
    """
    if isinstance(stack["k"], tuple):
        mine, parts = _append(_taken(stack, layer), None, k, v, place, prefix and _taken(prefix, layer))
        return {name: (*x[:layer], mine[name], *x[layer + 1 :]) for name, x in stack.items()}, parts
    return _append(stack, layer, k, v, place, prefix)


def _taken(stack, layer):
    """A layer's own arrays, out of tuples."""
    return {name: x[layer] for name, x in stack.items()}


def _append(stack, layer, k, v, place, prefix):
    """``append`` to stacked arrays, or to one layer's, where ``layer`` is None."""
    new, front = _stored(k, v, stack), () if layer is None else (layer,)
    take = lambda x: x if layer is None else jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
    of_layer = lambda tree: {name: take(x) for name, x in tree.items()}
    parts = [] if prefix is None else [of_layer(prefix)]
    if place.columns is None:

        def put(x, new, axis):
            at = [place.start if i == new.ndim + axis else 0 for i in range(new.ndim)]
            return jax.lax.dynamic_update_slice(x, new if layer is None else new[None], (*front, *at))

        stack = {name: put(x, new[name], TOKENS[name]) for name, x in stack.items()}
        return stack, [*parts, of_layer(stack)]
    parts += [of_layer(stack)] if place.before else []
    count = len(place.columns)

    def set_columns(x, new, axis):
        new = jax.lax.slice_in_dim(new, new.shape[axis] - count, None, axis=axis)
        at = (*front, *[slice(None)] * (new.ndim + axis), place.columns)
        return x.at[at].set(new if layer is None else jnp.moveaxis(new, axis, 0), unique_indices=True)

    return {name: set_columns(x, new[name], TOKENS[name]) for name, x in stack.items()}, [*parts, new]


def _stored(k, v, stack):
    """New keys and values [B, T, k, c] in the form and the type that the cache keeps them in."""
    if "k_scale" not in stack:
        return {"k": jnp.moveaxis(k, 1, 3).astype(stack["k"].dtype), "v": v.swapaxes(1, 2).astype(stack["v"].dtype)}
    (k, k_scale), (v, v_scale) = _rounded(k), _rounded(v)
    of_heads = lambda x: x.swapaxes(1, 2)
    return {"k": jnp.moveaxis(k, 1, 3), "v": of_heads(v), "k_scale": of_heads(k_scale), "v_scale": of_heads(v_scale)}


def _rounded(x):
    """int8 numbers and what each head's are multiplied by: x = numbers * scale, within half a scale."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), -1) / 127
    return jnp.round(x / jnp.where(scale > 0, scale, 1)[..., None]).astype(jnp.int8), scale


def check_forgetting(cache, columns: int, name: str) -> None:
    """Fails where a cache cannot forget so many columns: its rings have lost what came before them.

    Args:
      cache: or its shapes.
      columns: how many.
      name: of what asks for it.
    """
    if not (isinstance(cache, dict) and {"end", "position", "count"} <= set(cache)):
        raise ValueError(
            f"{name}={columns} for a cache that is none of models.init_cache: give forget, a function of it"
        )
    slack = len(cache["near"]["slack"]) if "near" in cache else columns
    if columns > slack:
        raise ValueError(f"{name}={columns} for a cache whose rings forget {slack} at most; give init_cache more slack")


def forget(cache, columns):
    """The cache without the last columns, of all rows, as if they had never been read.

    Args:
      cache: of fewer columns than it has room for so far: one that began to overwrite its first is lost.
      columns: how many, at least 0; of a cache with a ring, at most its ``slack``.
    """
    end, width = cache["end"] - columns, cache["position"].shape[1]
    after = (jnp.arange(width) >= end)[None]
    lost = (after & (cache["position"] >= 0)).sum(1, dtype=jnp.int32)
    cache = cache | {"position": jnp.where(after, -1, cache["position"]), "count": cache["count"] - lost}
    if "near" in cache:
        ring = cache["near"]["position"]
        back = (cache["end"] - 1 - jnp.arange(ring.shape[1])) % ring.shape[1]  # how many columns ago it was written
        cache["near"] = cache["near"] | {"position": jnp.where((back < columns)[None], -1, ring)}
    return cache | {"end": end}
