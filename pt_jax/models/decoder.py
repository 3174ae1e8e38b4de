"""A dense decoder (Llama, Qwen3) as functions over a dict of arrays.

Letters of every einsum: b row, t query position, s key position, d width, h heads, k key/value heads, g query heads
a key/value head, c head width, f hidden, v vocabulary. Weights are stored input axes first, layers stacked on
axis 0 and scanned, so that compile time does not grow with depth:

    embed [v, d], norm [d], unembed [v, d] (when not tied), and under "layers", each with a leading L:
    attn_norm [d], wq [d, h, c], wk [d, k, c], wv [d, k, c], wo [h, c, d], q_norm [c], k_norm [c] (when qk_norm),
    mlp_norm [d], gate [d, f], up [d, f], down [f, d]
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pt_jax import checks
from pt_jax.models.config import Config


def shapes(config: Config) -> dict:
    """The parameter tree with a shape in the place of every array."""
    d, h, k, c, f = config.width, config.heads, config.kv_heads, config.head_width, config.hidden
    layer = {
        "attn_norm": (d,),
        "wq": (d, h, c),
        "wk": (d, k, c),
        "wv": (d, k, c),
        "wo": (h, c, d),
        "mlp_norm": (d,),
        "gate": (d, f),
        "up": (d, f),
        "down": (f, d),
    }
    if config.qk_norm:
        layer |= {"q_norm": (c,), "k_norm": (c,)}
    tree = {"embed": (config.vocab, d), "norm": (d,)}
    if not config.tied:
        tree["unembed"] = (config.vocab, d)
    return tree | {"layers": {name: (config.layers, *shape) for name, shape in layer.items()}}


def init(config: Config, key, dtype=jnp.float32) -> dict:
    """Fresh parameters: norms 1, matrices normal with deviation 0.02.

    The two matrices that write into the residual stream are scaled by 1 / sqrt(2 L), so that its variance does not
    grow with depth (Radford et al. 2019, section 2.3).

    Args:
      config: the model.
      key: PRNG key.
      dtype: of the parameters.

    Returns:
      The tree of arrays that ``apply`` takes.
    """
    tree = shapes(config)
    paths = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))

    def fresh(i, path, shape):
        name = path[-1].key
        if name.endswith("norm"):
            return jnp.ones(shape, dtype)
        scale = 0.02 / math.sqrt(2 * config.layers) if name in ("wo", "down") else 0.02
        return (jax.random.normal(jax.random.fold_in(key, i), shape) * scale).astype(dtype)

    treedef = jax.tree.structure(tree, is_leaf=lambda x: isinstance(x, tuple))
    return jax.tree.unflatten(treedef, [fresh(i, path, shape) for i, (path, shape) in enumerate(paths)])


def init_cache(config: Config, rows: int, length: int, dtype=jnp.float32) -> dict:
    """An empty cache for ``length`` tokens of ``rows`` rows: keys and values [L, B, S, k, c], seen [B, S], end."""
    kv = jnp.zeros((config.layers, rows, length, config.kv_heads, config.head_width), dtype)
    return {"k": kv, "v": kv, "seen": jnp.zeros((rows, length), bool), "end": jnp.int32(0)}


def _rms_norm(x, gain, eps):
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)
    # gain has x's dtype already; reshape spells the broadcast out for jax_numpy_rank_promotion="raise"
    return y.astype(x.dtype) * gain.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def _rotation(position, width, base):
    """cos and sin [B, T, 1, c / 2] of the angles position * base^(-2i / c), in float32."""
    frequency = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = jnp.einsum("bt,c->btc", position.astype(jnp.float32), frequency)[:, :, None]
    return jnp.cos(angle), jnp.sin(angle)


def _rotate(x, rotation):
    """Turns the pairs (i, i + c / 2) of every head: the Llama convention of Hugging Face checkpoints."""
    cos, sin = rotation
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def _product(equation, x, w):
    return jnp.einsum(equation, x, w.astype(x.dtype))


def _qkv(config, w, x, rotation):
    """Queries, keys and values of a block's input, rotated to their positions."""
    h = _rms_norm(x, w["attn_norm"], config.eps)
    q, k, v = (_product(f"btd,d{n}c->bt{n}c", h, w[name]) for n, name in (("h", "wq"), ("k", "wk"), ("k", "wv")))
    if config.qk_norm:
        q, k = _rms_norm(q, w["q_norm"], config.eps), _rms_norm(k, w["k_norm"], config.eps)
    return _rotate(q, rotation), _rotate(k, rotation), v


def _finish(config, w, x, attended):
    """The block after attention: output projection and feed-forward layer, each added to the stream."""
    x = x + _product("bthc,hcd->btd", attended, w["wo"])
    h = _rms_norm(x, w["mlp_norm"], config.eps)
    h = jax.nn.silu(_product("btd,df->btf", h, w["gate"])) * _product("btd,df->btf", h, w["up"])
    return x + _product("btf,fd->btd", h, w["down"])


def hidden(config: Config, params, tokens, seen, cache=None):
    """The last hidden states, normed: [B, T, d], and the cache with these tokens appended (None without one).

    Arguments as ``apply``.
    """
    checks.shapes(tokens=(tokens, "B T"), seen=(seen, "B T"))
    x = params["embed"][tokens]
    if cache is None:
        x = _scan_blocks(config, params, x, seen)
    else:
        x, cache = _scan_blocks_cached(config, params, x, seen, cache)
    return _rms_norm(x, params["norm"], config.eps), cache


def _scan_blocks(config, params, x, seen):
    T = x.shape[1]
    rotation = _rotation(jnp.maximum(jnp.cumsum(seen, 1) - 1, 0), config.head_width, config.rope_base)
    visible = seen[:, None, None, :] & jnp.tril(jnp.ones((T, T), bool))[None, None]  # [B, 1, T, S]

    def block(x, w):
        q, k, v = _qkv(config, w, x, rotation)
        return _finish(config, w, x, jax.nn.dot_product_attention(q, k, v, mask=visible)), None

    return jax.lax.scan(block, x, params["layers"])[0]


def _scan_blocks_cached(config, params, x, seen, cache):
    (B, T), S, start = seen.shape, cache["seen"].shape[1], cache["end"]
    all_seen = jax.lax.dynamic_update_slice(cache["seen"], seen, (0, start))
    position = jax.lax.dynamic_slice(jnp.cumsum(all_seen, 1) - 1, (0, start), (B, T))
    rotation = _rotation(jnp.maximum(position, 0), config.head_width, config.rope_base)
    causal = jnp.arange(S)[None] <= start + jnp.arange(T)[:, None]
    visible = all_seen[:, None, None, :] & causal[None, None]  # [B, 1, T, S]

    # The cache travels in the carry and is written in place; as xs and ys of the scan it would be copied whole.
    def block(carry, xs):
        x, k_all, v_all = carry
        i, w = xs
        q, k, v = _qkv(config, w, x, rotation)
        k_all = jax.lax.dynamic_update_slice(k_all, k[None].astype(k_all.dtype), (i, 0, start, 0, 0))
        v_all = jax.lax.dynamic_update_slice(v_all, v[None].astype(v_all.dtype), (i, 0, start, 0, 0))
        k, v = (jax.lax.dynamic_index_in_dim(z, i, keepdims=False).astype(x.dtype) for z in (k_all, v_all))
        x = _finish(config, w, x, jax.nn.dot_product_attention(q, k, v, mask=visible))
        return (x, k_all, v_all), None

    xs = jnp.arange(config.layers), params["layers"]
    (x, k, v), _ = jax.lax.scan(block, (x, cache["k"], cache["v"]), xs)
    return x, {"k": k, "v": v, "seen": all_seen, "end": start + T}


def unembed(config: Config, params, x):
    """Hidden states [B, T, d] -> logits [B, T, V]."""
    return _product("btd,vd->btv", x, params["embed"] if config.tied else params["unembed"])


def apply(config: Config, params, tokens, seen, cache=None):
    """Logits of the next token at every position.

    Args:
      config: the model; bind it with ``functools.partial(apply, config)`` for functions that take any model.
      params: the tree of ``init`` or ``load``.
      tokens: [B, T] int32.
      seen: [B, T] bool, False for padding, on either side; a position counts the seen tokens before it.
      cache: None, or from ``init_cache`` with the tokens before these in it.

    Returns:
      logits [B, T, V] in the parameters' dtype, and the cache with these tokens appended (None without one). Row t
      predicts token t + 1. What stands at a position that is not seen has no meaning, and influences nothing.

    Raises:
      ValueError: the shapes disagree.
    """
    x, cache = hidden(config, params, tokens, seen, cache)
    return unembed(config, params, x), cache


def count(params) -> int:
    """The number of parameters of a tree."""
    return sum(x.size for x in jax.tree.leaves(params))


class Bound(NamedTuple):
    """A model's functions with its config bound, as samplers and losses take them."""

    apply: functools.partial  # (params, tokens, seen, cache=None) -> (logits, cache)
    init_cache: functools.partial  # (rows, length) -> cache


@functools.cache
def bind(config: Config) -> Bound:
    """``apply`` and ``init_cache`` of a config. The same config gives the same objects, so nothing is traced twice."""
    return Bound(functools.partial(apply, config), functools.partial(init_cache, config))
