"""What a decoder remembers of the tokens before: keys and values, and where each stands in its row's text.

    k          [L, B, k, c, S]: the same number of all of a head's keys side by side, and
    v          [L, B, k, S, c]: as a product with one query a head reads them fastest
    position   [B, S] int32 of each key in its text, -1 where none is seen
    count      [B] int32, tokens seen so far: the position of the next
    end        int32, columns written so far; the next one is written to column end mod S
    room       [N, 0]: no numbers, but a first axis: how many tokens the cache is for, whatever S is now
    routes     [M, B, S, K] int32, which experts the M layers that have them chose; of a model with experts

Who sees whom is a matter of positions, not of columns: rows may lie in a cache at different places, and one that begins
anew overwrites the oldest columns.
"""

import jax
import jax.numpy as jnp

from pt_jax.models.config import Config
from pt_jax.models.visibility import Sight


def init_cache(config: Config, rows: int, length: int, dtype=jnp.float32) -> dict:
    """An empty cache for ``length`` tokens of ``rows`` rows.

    Args:
      config: the model.
      rows: B.
      length: S.
      dtype: of keys and values.
    """
    heads, width = (config.layers, rows, config.kv_heads), config.head_width
    cache = {
        "k": jnp.zeros((*heads, width, length), dtype), "v": jnp.zeros((*heads, length, width), dtype),
        "position": jnp.full((rows, length), -1, jnp.int32), "count": jnp.zeros(rows, jnp.int32),
        "end": jnp.int32(0), "room": jnp.zeros((length, 0)),
    }  # fmt: skip
    if config.experts:
        shape = (sum(config.has_experts), rows, length, config.experts_per_token)
        cache["routes"] = jnp.zeros(shape, jnp.int32)
    return cache


def begin(cache, seen):
    """Makes room for tokens.

    Args:
      cache: or None, for rows that are whole.
      seen: [B, T] bool, which of the new tokens are no padding.

    Returns:
      The column that they go to, the ``Sight`` of them on all that is there, and the cache that knows their positions.

    Raises:
      ValueError: there are more tokens than the cache has columns.
    """
    T, S = seen.shape[1], cache["position"].shape[1]
    if T > S:
        raise ValueError(f"{T} tokens do not fit a cache for {S}; give init_cache the length of prompt and answer")
    # one column may be written anywhere, several must not be torn: they are appended
    start = cache["end"] % S if T == 1 else cache["end"]
    count = cache["count"][:, None] + jnp.cumsum(seen, 1)
    position = jnp.maximum(count - 1, 0)
    mine = jnp.where(seen, position, -1)
    keys = jax.lax.dynamic_update_slice(cache["position"], mine, (0, start))[:, None, None]
    query = position[:, None, :, None]
    view = Sight(position, (keys >= 0) & (keys <= query), query - keys)
    return start, view, cache | {"position": keys[:, 0, 0], "count": count[:, -1], "end": cache["end"] + T}


def append(stack, new, layer, start, axis):
    """Keys or values of a layer with new ones in their columns.

    Args:
      stack: "k" or "v" of the cache; it should be a loop's own, to be changed in place.
      new: [B, T, k, c].
      layer: which of L.
      start: the first column.
      axis: of the stack, that of S.

    Returns:
      The stack, and the layer's part of it.
    """
    at = [start if i == axis else 0 for i in range(1, stack.ndim)]
    stack = jax.lax.dynamic_update_slice(stack, jnp.moveaxis(new, 1, axis - 1)[None].astype(stack.dtype), (layer, *at))
    return stack, jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)


def forget(cache, columns):
    """The cache without the last columns, of all rows, as if they had never been read.

    Args:
      cache: of fewer columns than it has room for so far: one that began to overwrite its first is lost.
      columns: how many, at least 0.
    """
    end = cache["end"] - columns
    after = (jnp.arange(cache["position"].shape[1]) >= end)[None]
    lost = (after & (cache["position"] >= 0)).sum(1, dtype=jnp.int32)
    return cache | {
        "position": jnp.where(after, -1, cache["position"]), "count": cache["count"] - lost, "end": end,
    }  # fmt: skip
