"""What a decoder remembers of the tokens before: keys and values, and where each stands in its row's text.

    k, v       [L, B, k, S, c]: a head's keys lie side by side, which a product with one query reads fastest
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
    kv = jnp.zeros((config.layers, rows, config.kv_heads, length, config.head_width), dtype)
    cache = {
        "k": kv, "v": kv, "position": jnp.full((rows, length), -1, jnp.int32), "count": jnp.zeros(rows, jnp.int32),
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


def append(stack, new, layer, start):
    """Keys or values of a layer with new ones in their columns.

    Args:
      stack: [L, B, k, S, c]; it should be a loop's own, to be changed in place.
      new: [B, T, k, c].
      layer: which of L.
      start: the first column.

    Returns:
      The stack, and the layer's part of it [B, k, S, c].
    """
    new = new.swapaxes(1, 2)[None].astype(stack.dtype)
    stack = jax.lax.dynamic_update_slice(stack, new, (layer, 0, 0, start, 0))
    return stack, jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)
