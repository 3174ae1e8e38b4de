"""Causal attention of whole rows in tiles of queries, as XLA's CPU backend computes it well.

Each tile sees the keys up to its own end and no others, so that about half of the scores are never computed. Their
exponentials are not kept for the backward pass but computed again from the largest score and their sum, as in
FlashAttention (Dao et al. 2022, https://arxiv.org/abs/2205.14135), which also gives the gradient:

    P = exp(S - m) / l,   D = rowsum(dO * O),   dS = P * (dO V^T - D),   dQ = dS K,   dK = dS^T Q,   dV = P^T dO

m and l stay apart: added up as m + log l, as in FlashAttention-2, they would round like the largest score does.

On a CPU the products over [queries, keys] are cheap, and moving arrays of that size is not: left to itself, XLA lays
P and dS out anew, columns first, before it sums over queries, and keeps P of every layer in memory that nothing has
touched before. Here the small operand of such a product is the one that is transposed.
"""

from functools import partial

import jax
import jax.numpy as jnp

TILE = 128  # queries, at least
MOST = 8  # tiles: each is a part of the program


def attend(q, k, v, visible, *, scale, softcap=None):
    """Attention of queries to the keys of their own row that are visible and do not lie ahead.

    A query that sees nothing gets numbers without meaning, but finite ones.

    Args:
      q: [B, T, h, c].
      k: [B, T, k, c]; k divides h.
      v: [B, T, k, c].
      visible: [B or 1, 1, T, T] bool.
      scale: of the scores; may be traced.
      softcap: bounds the scores before the mask (Gemma 2), or None.

    Returns:
      [B, T, h, c] in the type of v.
    """
    B, T, heads, width = q.shape
    groups = k.shape[2]
    q = (q * jnp.asarray(scale, q.dtype)).reshape(B, T, groups, -1, width).transpose(0, 2, 3, 1, 4)
    k, v = (x.swapaxes(1, 2) for x in (k, v))  # heads before tokens
    out = _attend(softcap, q, k, v, visible)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, heads, width)


def _tiles(length):
    size = max(TILE, -(-length // MOST))
    return [(first, min(first + size, length)) for first in range(0, length, size)]


def _product(equation, x, y):
    """In float32, of numbers of 16 bits too. A CPU has no products of those, and XLA not always a way around it."""
    if jax.default_backend() == "cpu":
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _scores(softcap, q, k, visible, tile):
    """What a tile's queries make of the keys up to its end: [B, k, g, t, s] float32."""
    first, end = tile
    q, k = q[:, :, :, first:end], k[:, :, :end]
    scores = _product("bkgtc,bksc->bkgts", q, k)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return jnp.where(visible[:, :, None, first:end, :end], scores, jnp.finfo(jnp.float32).min)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(softcap, q, k, v, visible):
    """q [B, k, g, T, c], k and v [B, k, T, c] -> [B, k, g, T, c]"""
    return _forward(softcap, q, k, v, visible)[0]


def _forward(softcap, q, k, v, visible):
    outs, tops, sums = [], [], []
    for tile in _tiles(q.shape[3]):
        scores = _scores(softcap, q, k, visible, tile)
        most = scores.max(-1, keepdims=True)
        shares = jnp.exp(scores - most)
        total = shares.sum(-1, keepdims=True)
        out = _product("bkgts,bksc->bkgtc", shares.astype(v.dtype), v[:, :, : tile[1]])
        outs.append((out / total).astype(v.dtype))
        tops.append(most)
        sums.append(total)
    out, *statistics = (jnp.concatenate(x, 3) for x in (outs, tops, sums))
    return out, (q, k, v, visible, out, *statistics)


def _backward(softcap, kept, g):
    q, k, v, visible, out, most, total = kept
    delta = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
    dq = []
    dk, dv = (jnp.zeros(x.swapaxes(2, 3).shape, jnp.float32) for x in (k, v))  # [B, k, c, T]
    for first, end in _tiles(q.shape[3]):
        scores = _scores(softcap, q, k, visible, (first, end))
        here = (slice(None),) * 3 + (slice(first, end),)
        shares = jnp.exp(scores - most[here]) / total[here]
        change = shares * (_product("bkgtc,bksc->bkgts", g[here], v[:, :, :end]) - delta[here])
        if softcap is not None:
            change = change * (1 - jnp.square(jnp.where(jnp.abs(scores) <= softcap, scores, 0) / softcap))
        change, shares = change.astype(q.dtype), shares.astype(v.dtype)
        dq.append(_product("bkgts,bksc->bkgtc", change, k[:, :, :end]).astype(q.dtype))
        dk = dk.at[..., :end].add(_product("bkgtc,bkgts->bkcs", q[here], change))
        dv = dv.at[..., :end].add(_product("bkgtc,bkgts->bkcs", g[here], shares))
    dk, dv = (x.swapaxes(2, 3).astype(of.dtype) for x, of in ((dk, k), (dv, v)))
    return jnp.concatenate(dq, 3), dk, dv, None


_attend.defvjp(_forward, _backward)
