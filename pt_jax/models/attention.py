"""Scaled dot-product attention with grouped heads: one function, whichever program computes it.

scores = scale * q k^T;   scores = cap tanh(scores / cap), with a soft-cap;   out = softmax(scores, -inf where hidden) v

    "plain"     the scores [B, h, T, S] are in memory, in float32. Computes everything.
    "tiles"     written out as well, a tile of queries at a time, with a backward pass of its own (``tiles``): whole
                rows; no cache, and no derivative of the derivative. What a CPU uses by itself.
    "cudnn"     NVIDIA's flash attention through ``jax.nn.dot_product_attention``: 16-bit types, heads of a multiple of
                8, no soft-cap. Rows of one text are handed over with their padding behind (``visibility.to_front``), as
                causal attention with a window: nothing of size T * S is in memory, and what lies ahead is not computed.
                Packed rows, and rows that continue a cache, need a mask, which cuDNN takes as numbers to add: 2 bytes
                for each of [B, 1, T, S].
    "splash"    Pallas's flash attention for TPUs: causal, windows, soft-caps, packed rows by numbers of texts; no
                cache and no branches, which numbers that are equal or not cannot say. Nothing of size T * S is in
                memory, and blocks of 128 tokens or more that are hidden are not computed.

All but the first take the gradient of the scores from the sum over dO * O. With O in 16 bits that costs digits where
the values have much in common: 6% of the gradient of wk instead of 1.5% in one model with random weights, with cuDNN as
with the same arithmetic in numpy. In float32 nothing is lost.

Where the tokens of a row lie on several devices (``meshes``), each has its own queries and gathers the keys and values
of all: with grouped heads they are few, and the gradient goes back by a sum that leaves each device its own. Scores and
everything else of size T are an n-th on each of n devices. cuDNN is handed a mask. With it, as written out, queries are
dealt out (``meshes.dealt``) where that can be: all devices have the same to do, and leave out most of what no query
sees. Splash leaves it out by itself, of tokens in their order: the device with the last ones has up to twice the mean
of work. Dealt out it would be a kernel for each n-th of a device's queries, of few blocks each.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pt_jax.models import meshes, tiles
from pt_jax.models.config import Config

PARTS = 4  # most parts in which queries that are dealt out are worked through: of four, 5/8 of all products
LANES = 128  # splash works in blocks of this many tokens, or of multiples


def kernel(config: Config, how: str, *, dtype, seen, cached: bool) -> str:
    """Which program computes the attention of these rows.

    Args:
      config: the model.
      how: of ``Execution.attention``.
      dtype: of queries, keys and values.
      seen: see ``visibility``; only its shape and type are looked at.
      cached: whether the rows continue a cache.

    Returns:
      "plain", "tiles", "cudnn" or "splash".

    Raises:
      ValueError: the one that is asked for does not compute this.
    """
    against = {"tiles": _against_tiles, "cudnn": _against_cudnn, "splash": _against_splash}
    if how == "auto":
        best = {"cpu": "tiles", "gpu": "cudnn", "tpu": "splash"}.get(jax.default_backend(), "plain")
        few = cached and seen.shape[1] % 2  # one token: its scores are few. cuDNN's masks are of even length
        return "plain" if best == "plain" or few or against[best](config, dtype, seen, cached) else best
    why = against[how](config, dtype, seen, cached) if how in against else None
    if why:
        raise ValueError(f"attention={how!r} {why}; use attention='auto'")
    return how


def _against_tiles(config, dtype, seen, cached):
    if cached:
        return "does not continue a cache"
    if meshes.apart(seen.shape[1]):
        return "does not know rows whose tokens lie on several devices"
    return None


def _against_cudnn(config, dtype, seen, cached):
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"does not compute in {np.dtype(dtype)}, only in bfloat16 and float16"
    if config.attention_softcap is not None or config.scale_by_layer:
        return "does not know a soft-cap, nor a scale a layer"
    widest = 256 if _hopper() else 128
    if config.head_width % 8 or config.head_width > widest:
        return f"takes heads of a multiple of 8 numbers, up to {widest}, not of {config.head_width}"
    T = seen.shape[1]
    if T % 2 and (seen.dtype != bool or meshes.apart(T)):
        return f"takes packed rows of an even number of tokens, not of {T}"
    return None


def _hopper():
    device = jax.devices()[0]
    return device.platform == "gpu" and float(getattr(device, "compute_capability", 0)) >= 9


def _against_splash(config, dtype, seen, cached):
    if cached:
        return "does not continue a cache"
    if seen.ndim == 3:
        return "does not know texts that share their beginning"
    if jax.device_count() > 1 and jax.sharding.get_abstract_mesh().empty:
        return "splits its work over devices by the mesh of jax.set_mesh or training.sharding.within, and none is set"
    return None


def of_window(name: str, window: int, *, scale: float, softcap=None, texts=None):
    """Causal attention of whole rows, each token seeing the last ``window``: a function of q, k, v.

    Args:
      name: "cudnn" or "splash".
      window: how many tokens one sees, itself included; 0: all.
      scale: of the scores; of splash it may be traced.
      softcap: of splash.
      texts: [B, T] int32 of splash, tokens with different numbers do not see each other; None: one text a row, with
        its padding behind.
    """
    if name == "cudnn":
        near = (window - 1, 0) if window else None
        return functools.partial(
            jax.nn.dot_product_attention, scale=scale, is_causal=True, local_window_size=near, implementation="cudnn"
        )
    return functools.partial(_splash, window=window, scale=scale, softcap=softcap, texts=texts)


def of_mask(name: str, visible, *, scale, softcap=None):
    """Attention of whole rows to what a mask shows: a function of q, k, v.

    A query that sees nothing gets numbers without meaning, but finite ones.

    Args:
      name: "plain", "tiles" or "cudnn".
      visible: [B or 1, 1, T, S] bool.
      scale: of the scores; may be traced in "plain".
      softcap: bounds the scores before the mask (Gemma 2), or None.
    """
    if meshes.apart(visible.shape[2]):
        return functools.partial(_over_context, name=name, visible=visible, scale=scale, softcap=softcap)
    if name == "cudnn":
        return functools.partial(
            jax.nn.dot_product_attention, mask=visible, scale=scale, is_causal=True, implementation="cudnn"
        )
    if name == "tiles":
        return functools.partial(tiles.attend, visible=visible, scale=scale, softcap=softcap)
    written_out = functools.partial(_plain, visible=visible, scale=scale, softcap=softcap)
    if softcap is not None or not isinstance(scale, float):
        return written_out
    compute = functools.partial(jax.nn.dot_product_attention, mask=visible, scale=scale, implementation="xla")
    # whose float16 products are asked for in a precision that only GPUs have
    return lambda q, k, v: (written_out if q.dtype == jnp.float16 else compute)(q, k, v)


def of_cache(name: str, visible, *, scale, softcap=None):
    """Attention of a few queries to the parts of a cache: a function of q and the parts.

    A part is k [R, k, c, S] and v [R, k, S, c], and the scales of numbers in int8 (``cache``). Where R is less than B,
    B / R rows after each other share it.

    Args:
      name: "plain" or "cudnn".
      visible: [B, 1, T, S] bool of each part.
      scale, softcap: as ``of_mask``.
    """
    if name == "cudnn":
        mask = jnp.concatenate(visible, 3)
        compute = functools.partial(jax.nn.dot_product_attention, mask=mask, scale=scale, implementation="cudnn")
        return lambda q, parts: compute(q, *_joined(parts, len(q), q.dtype))
    return functools.partial(_cached, visible=visible, scale=scale, softcap=softcap)


def _joined(parts, rows, dtype):
    """Keys and values [B, S, k, c] of all parts."""
    one = lambda part, name, axis: jnp.repeat(
        jnp.moveaxis(_numbers(part, name, dtype), axis, 1), rows // len(part[name]), 0
    )
    return (jnp.concatenate([one(part, *of) for part in parts], 1) for of in (("k", 3), ("v", 2)))


def _numbers(part, name, dtype):
    x, scale = part[name].astype(dtype), part.get(f"{name}_scale")
    return x if scale is None else x * jnp.expand_dims(scale, 2 if name == "k" else 3).astype(dtype)


def _cached(q, parts, *, visible, scale, softcap):
    """Softmax over all parts together: of each its largest score, and with it what its shares add up to.

    With m_i the largest score of part i, e_i = exp(scores_i - m_i) and w_i = exp(m_i - max m),

        out = sum of w_i (e_i v_i) / sum of w_i (sum of e_i)
    """
    one = functools.partial(_of_part, q, scale=scale, softcap=softcap)
    if len(parts) == 1:
        return one(parts[0], visible[0], shares=jax.nn.softmax)[0].astype(q.dtype)
    outs, tops, sums = zip(*(one(part, seen, shares=_unnormalised) for part, seen in zip(parts, visible)))
    top = functools.reduce(jnp.maximum, tops)
    weights = [jnp.exp(x - top) for x in tops]
    whole = sum(w * x for w, x in zip(weights, sums))
    return sum((w / whole)[..., None] * out for w, out in zip(weights, outs)).astype(q.dtype)


def _unnormalised(scores):
    return jnp.exp(scores - scores.max(-1, keepdims=True))


def _of_part(q, part, visible, *, scale, softcap, shares):
    """What queries get of a part [R, ...], [B, T, h, c] float32, its largest scores and sums of shares [B, T, h].

    The queries of the heads and of the rows that share keys are the rows of one product, and the keys lie as it wants
    them. XLA's products over keys and values [B, S, k, c] take three times as long on a CPU.
    """
    B, T, heads, width = q.shape
    R, groups, _, S = part["k"].shape
    each = (B // R, T, heads // groups)
    many = lambda x: x.reshape(R, *each[:2], groups, each[2], width).transpose(0, 3, 1, 2, 4, 5)
    q = many(q).reshape(R, groups, -1, width)
    scores = jnp.einsum("bkxc,bkcs->bkxs", q, part["k"].astype(q.dtype), preferred_element_type=jnp.float32) * scale
    if "k_scale" in part:
        scores = scores * part["k_scale"][:, :, None]
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    visible = visible.reshape(R, 1, *each[:2], 1, S)
    scores = jnp.where(visible, scores.reshape(R, groups, *each, S), jnp.finfo(jnp.float32).min)
    shared = shares(scores)
    back = lambda x: jnp.moveaxis(x, 1, 3).reshape(B, T, heads, *x.shape[5:])
    top, whole = back(scores.max(-1)), back(shared.sum(-1))
    if "v_scale" in part:
        shared = shared * part["v_scale"][:, :, None, None, None]
    shared = shared.astype(q.dtype).reshape(R, groups, -1, S)
    # not in float16, in which a sum over many keys that is yet to be divided may be infinite
    out = jnp.einsum("bkxs,bksc->bkxc", shared, part["v"].astype(q.dtype), preferred_element_type=jnp.float32)
    return back(out.reshape(R, groups, *each, width)), top, whole


def _plain(q, k, v, *, visible, scale, softcap):
    """Written out: ``jax.nn.dot_product_attention`` knows no soft-cap and no traced scale."""
    B, T, heads, width = q.shape
    groups = k.shape[2]
    q = q.reshape(B, T, groups, heads // groups, width)
    scores = jnp.einsum("btkgc,bskc->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(visible[:, :, None], scores, jnp.finfo(jnp.float32).min)
    shares = jax.nn.softmax(scores).astype(v.dtype)
    return jnp.einsum("bkgts,bskc->btkgc", shares, v).reshape(B, T, heads, width)


def _over_context(q, k, v, *, name, visible, scale, softcap):
    """Each device's queries to the keys of the whole row; where they are dealt out, to those that they may see.

    In p parts, these are (p + 1) / 2p of all products.
    """
    T, deals = q.shape[1], meshes.deals(q.shape[1])
    parts = math.gcd(meshes.size("context"), PARTS) if deals else 1
    swap = lambda x: jax.lax.all_to_all(x, "context", 1, 1, tiled=True) if deals else x  # it is its own inverse

    def one(q, k, v, visible, scales):
        if name == "cudnn":
            return jax.nn.dot_product_attention(q, k, v, mask=visible, scale=scale, implementation="cudnn")
        return _plain(q, k, v, visible=visible, scale=scales, softcap=softcap)

    def of_mine(q, k, v, visible, scales):
        k, v = (meshes.gathered(x, "context", 1) for x in (k, v))
        ends = [T * (i + 1) // parts for i in range(parts)]
        each = zip(jnp.split(swap(q), parts, 1), jnp.split(visible, parts, 2), ends)
        return swap(jnp.concatenate([one(q, k[:, :n], v[:, :n], seen[..., :n], scales) for q, seen, n in each], 1))

    rows = P(meshes.rows(len(q)), "context", meshes.splits("tensor", k.shape[2]))
    seen = P(rows[0] if len(visible) > 1 else None, None, "context")
    scales = jnp.asarray(scale, jnp.float32)  # it may be a layer's own, and traced
    return meshes.on_each(of_mine, (rows, rows, rows, seen, P()), rows)(q, k, v, visible, scales)


def _splash(q, k, v, *, window, scale, softcap, texts):
    """Rows filled up to whole blocks: causally, no token sees what is behind it.

    The compiler does not split kernels itself: each device is given its own rows, heads and queries.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    B, T = q.shape[:2]
    batch, context, heads = meshes.rows(B), meshes.splits("context", T), meshes.splits("tensor", k.shape[2])
    parts, of_heads = (meshes.size(axis) for axis in (context, heads))
    more = -T % (LANES * parts)
    length = T + more
    fill = lambda x: jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2))
    mask = splash.LocalMask((length, length), (window - 1, 0), 0) if window else splash.CausalMask((length, length))
    block = next(size for size in (4 * LANES, 2 * LANES, LANES) if length % (size * parts) == 0)
    sizes = {f"block_{side}": block for side in ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")}
    compute = splash.make_splash_mha(
        splash.splash_attention_mask.MultiHeadMask([mask] * q.shape[2]), block_sizes=splash.BlockSizes(**sizes),
        attn_logits_soft_cap=softcap, head_shards=of_heads, q_seq_shards=parts,
        interpret=jax.default_backend() != "tpu",
    )  # fmt: skip

    def rows(compute, q, k, v, texts):
        k, v = (meshes.gathered(x, context, 2) for x in (k, v))
        ids = None if texts is None else splash.SegmentIds(texts, meshes.gathered(texts, context, 1))
        return jax.vmap(compute)(q, k, v, ids)

    if meshes.sizes():
        spec = P(batch, heads, context)
        each = compute.manual_sharding_spec(NamedSharding(jax.sharding.get_abstract_mesh(), P(heads, context)))
        rows = meshes.on_each(rows, (each, spec, spec, spec, P(batch, context)), spec)
    first = lambda x: fill(x).swapaxes(1, 2)  # heads before tokens
    q = q * jnp.asarray(scale, q.dtype)
    out = rows(compute, first(q), first(k), first(v), None if texts is None else fill(texts))
    return out.swapaxes(1, 2)[:, :T]
