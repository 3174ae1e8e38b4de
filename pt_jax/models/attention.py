"""Scaled dot-product attention with grouped heads: one function, whichever program computes it.

scores = scale * q k^T;   scores = cap tanh(scores / cap), with a soft-cap;   out = softmax(scores, -inf where hidden) v
"""

import jax
import jax.numpy as jnp


def attend(q, k, v, visible, *, scale, softcap=None, how="auto"):
    """What each query takes from the values that are visible to it.

    Without a soft-cap this is ``jax.nn.dot_product_attention``; with one, which that function does not know, it is
    written out. A query that sees nothing gets numbers without meaning, but finite ones.

    Args:
      q: [B, T, h, c].
      k, v: [B, S, k, c]; each of the k heads serves h / k neighbouring queries.
      visible: [B or 1, 1, T, S] bool.
      scale: of the scores; may be traced.
      softcap: bounds the scores before the mask (Gemma 2), or None.
      how: see ``Execution.attention``.

    Returns:
      [B, T, h, c] in the type of q.

    Raises:
      ValueError: cuDNN is asked for what it does not compute.
    """
    simple = softcap is None and isinstance(scale, float)
    small = q.dtype in (jnp.bfloat16, jnp.float16)
    if how == "cudnn" and not (simple and small):
        why = f"in {q.dtype}" if simple else "with a soft-cap or a scale a layer"
        raise ValueError(f"attention='cudnn' does not compute attention {why}; use 'auto', or a 16-bit dtype")
    if how == "cudnn" or (how == "auto" and simple and small and jax.default_backend() == "gpu"):
        return jax.nn.dot_product_attention(q, k, v, mask=visible, scale=scale, implementation="cudnn")
    if simple:
        return jax.nn.dot_product_attention(q, k, v, mask=visible, scale=scale, implementation="xla")
    B, T, heads, width = q.shape
    groups = k.shape[2]
    q = q.reshape(B, T, groups, heads // groups, width)
    scores = jnp.einsum("btkgc,bskc->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(visible[:, :, None], scores, jnp.finfo(jnp.float32).min)
    shares = jax.nn.softmax(scores).astype(v.dtype)
    return jnp.einsum("bkgts,bskc->btkgc", shares, v).reshape(B, T, heads, width)
