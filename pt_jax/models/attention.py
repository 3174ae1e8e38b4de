"""Scaled dot-product attention with grouped heads: one function, whichever program computes it.

scores = scale * q k^T;   scores = cap tanh(scores / cap), with a soft-cap;   out = softmax(scores, -inf where hidden) v
"""

import jax
import jax.numpy as jnp


def attend(q, k, v, visible, *, scale, softcap=None):
    """What each query takes from the values that are visible to it.

    Without a soft-cap this is ``jax.nn.dot_product_attention``; with one, which that function does not know, it is
    written out. A query that sees nothing gets numbers without meaning, but finite ones.

    Args:
      q: [B, T, h, c].
      k, v: [B, S, k, c]; each of the k heads serves h / k neighbouring queries.
      visible: [B or 1, 1, T, S] bool.
      scale: of the scores; may be traced.
      softcap: bounds the scores before the mask (Gemma 2), or None.

    Returns:
      [B, T, h, c] in the type of q.
    """
    if softcap is None and isinstance(scale, float):
        return jax.nn.dot_product_attention(q, k, v, mask=visible, scale=scale)
    B, T, heads, width = q.shape
    groups = k.shape[2]
    q = q.reshape(B, T, groups, heads // groups, width)
    scores = jnp.einsum("btkgc,bskc->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(visible[:, :, None], scores, jnp.finfo(jnp.float32).min)
    shares = jax.nn.softmax(scores).astype(v.dtype)
    return jnp.einsum("bkgts,bskc->btkgc", shares, v).reshape(B, T, heads, width)
