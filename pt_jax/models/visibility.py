"""Which token sees which, and where each stands in its text: all that ``seen`` says.

``seen`` is [B, T] bool, False for padding: one text a row. Or it is [B, T] int32, 0 for padding, and a row holds
several texts that do not see each other: 1, 2, 3, ... number them, and each begins at position 0 again. ``segments``
makes numbers for texts that begin alike: branches of one document see the document's own tokens (branch 0) and
themselves, so that a prompt stands once in front of all its answers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BRANCHES = 1 << 16  # of one document; a segment is document * BRANCHES + branch


class Sight(NamedTuple):
    """What queries see of keys, windows aside.

    Args:
      position: [B, T] int32 of each query in its text.
      visible: [B, 1, T, S] bool.
      behind: [B or 1, 1, T, S] int32, how many tokens a key lies behind a query.
    """

    position: jax.Array
    visible: jax.Array
    behind: jax.Array


def segments(document, branch):
    """Numbers for ``seen`` of texts that share their beginnings.

    Args:
      document: int, from 1; 0 with branch 0 is padding.
      branch: int, 0 for the beginning, which must stand before its branches; 1, 2, ... for what goes on from it.

    Returns:
      int32 of their shape.

    >>> print(segments(jnp.array([1, 1, 1, 1, 0]), jnp.array([0, 0, 1, 2, 0])) > 0)
    [ True  True  True  True False]
    """
    return jnp.asarray(document, jnp.int32) * BRANCHES + jnp.asarray(branch, jnp.int32)


def sight(seen, start, queries: int) -> Sight:
    """What ``queries`` tokens from ``start`` on see of all.

    Args:
      seen: [B, S] bool, or int32 of segments.
      start: where the queries begin; may be traced.
      queries: T.
    """
    B, S = seen.shape
    back = (start + jnp.arange(queries)[:, None] - jnp.arange(S)[None])[None, None]
    if seen.dtype == bool:
        position = jax.lax.dynamic_slice(jnp.cumsum(seen, 1) - 1, (0, start), (B, queries))
        return Sight(jnp.maximum(position, 0), seen[:, None, None, :] & (back >= 0), back)
    query = jax.lax.dynamic_slice(seen, (0, start), (B, queries))[:, None, :, None]
    key = seen[:, None, None, :]
    document, branch = jnp.divmod(key, BRANCHES)
    together = (document == query // BRANCHES) & ((branch == 0) | (branch == query % BRANCHES))
    visible = together & (key != 0) & (query != 0) & (back >= 0)
    position = jnp.maximum(visible.sum(-1)[:, 0] - 1, 0)
    return Sight(position, visible, position[:, None, :, None] - position[:, None, None, :])
