"""A decoder as functions over a dict of arrays: one program for every family, chosen by ``Config``.

Letters of every einsum: b row, t query position, s key position, d width, h heads, k key/value heads, c head width,
f hidden, v vocabulary. Weights are stored input axes first, layers stacked on axis 0 and scanned, so that compile time
does not grow with depth:

    embed [v, d], norm [d], unembed [v, d] (when not tied), positions [n, d] (when learned), and under "layers", each
    with a leading L: wq [d, h, c], wk [d, k, c], wv [d, k, c], wo [h, c, d], gate [d, f], up [d, f], down [f, d],
    attn_norm, mlp_norm [d] of what goes in, attn_out_norm, mlp_out_norm [d] of what comes out, q_norm, k_norm [c]
    (or whole, [h, c] and [k, c]). A bias has the name of its product and the axes of its result: wq_bias [h, c].
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pt_jax import checks
from pt_jax.models import attention, rotary
from pt_jax.models.config import Config


def shapes(config: Config) -> dict:
    """The parameter tree with a shape in the place of every array."""
    d, h, k, c, f = config.width, config.heads, config.kv_heads, config.head_width, config.hidden
    layer = {"wq": (d, h, c), "wk": (d, k, c), "wv": (d, k, c), "wo": (h, c, d), "up": (d, f), "down": (f, d)}
    if config.gated:
        layer["gate"] = (d, f)
    if config.qkv_bias:
        layer |= {"wq_bias": (h, c), "wk_bias": (k, c), "wv_bias": (k, c)}
    if config.out_bias:
        layer["wo_bias"] = (d,)
    if config.mlp_bias:
        layer |= {f"{name}_bias": layer[name][1:] for name in ("gate", "up", "down") if name in layer}
    if config.qk_norm:
        layer |= {"q_norm": (h, c), "k_norm": (k, c)} if config.qk_norm_whole else {"q_norm": (c,), "k_norm": (c,)}
    tree = {"embed": (config.vocab, d), "norm": (d,)}
    if config.norms != "post":
        layer |= {"attn_norm": (d,), "mlp_norm": (d,)}
    if config.norms != "pre":
        layer |= {"attn_out_norm": (d,), "mlp_out_norm": (d,)}
    if config.norm == "layer":
        layer |= {
            f"{name}_bias": (d,) for name in layer if name.startswith(("attn_", "mlp_")) and name.endswith("norm")
        }
        tree["norm_bias"] = (d,)
    if config.learned_positions:
        tree["positions"] = (config.max_length, d)
    if not config.tied:
        tree["unembed"] = (config.vocab, d)
    return tree | {"layers": {name: (config.layers, *shape) for name, shape in layer.items()}}


def init(config: Config, key, dtype=jnp.float32) -> dict:
    """Fresh parameters: norms 1 (0 where 1 is added to them), biases 0, matrices normal with deviation 0.02.

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
        if name.endswith("bias"):
            return jnp.zeros(shape, dtype)
        if name.endswith("norm"):
            return jnp.full(shape, config.norm != "rms_plus_one", dtype)
        scale = 0.02 / math.sqrt(2 * config.layers) if name in ("wo", "down") else 0.02
        return (jax.random.normal(jax.random.fold_in(key, i), shape) * scale).astype(dtype)

    treedef = jax.tree.structure(tree, is_leaf=lambda x: isinstance(x, tuple))
    return jax.tree.unflatten(treedef, [fresh(i, path, shape) for i, (path, shape) in enumerate(paths)])


def init_cache(config: Config, rows: int, length: int, dtype=jnp.float32) -> dict:
    """An empty cache for ``length`` tokens of ``rows`` rows: keys and values [L, B, S, k, c], seen [B, S], end."""
    kv = jnp.zeros((config.layers, rows, length, config.kv_heads, config.head_width), dtype)
    return {"k": kv, "v": kv, "seen": jnp.zeros((rows, length), bool), "end": jnp.int32(0)}


def _over(x, gain, axes):
    """A weight of the last axes, spelt out over x for jax_numpy_rank_promotion="raise"."""
    return gain.reshape((1,) * (x.ndim - axes) + gain.shape)


def _norm(config, w, name, x, axes=1):
    """Normalises the last ``axes`` axes of x together, by the weights ``w[name]``."""
    y, over = x.astype(jnp.float32), tuple(range(-axes, 0))
    if config.norm == "layer":
        y = y - jnp.mean(y, over, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), over, keepdims=True) + config.eps)
    if config.norm == "rms_plus_one":  # multiplied before it is rounded, as Gemma does
        return (y * (1 + _over(y, w[name].astype(jnp.float32), axes))).astype(x.dtype)
    y = y.astype(x.dtype) * _over(x, w[name].astype(x.dtype), axes)
    return y + _over(x, w[f"{name}_bias"].astype(x.dtype), axes) if config.norm == "layer" else y


def _product(equation, x, w):
    return jnp.einsum(equation, x, w.astype(x.dtype))


def _linear(equation, x, w, name):
    """The product with a weight, and its bias where there is one."""
    y = _product(equation, x, w[name])
    bias = w.get(f"{name}_bias")
    return y if bias is None else y + _over(y, bias.astype(y.dtype), bias.ndim)


def _qkv(config, w, x, rotation):
    """Queries, keys and values of a block's input, rotated to their positions (``rotation`` None: not rotated)."""
    h = x if config.norms == "post" else _norm(config, w, "attn_norm", x)
    q, k, v = (_linear(f"btd,d{n}c->bt{n}c", h, w, name) for n, name in (("h", "wq"), ("k", "wk"), ("k", "wv")))
    if config.qk_norm:
        axes = 2 if config.qk_norm_whole else 1
        q, k = _norm(config, w, "q_norm", q, axes), _norm(config, w, "k_norm", k, axes)
    if rotation is not None:
        q, k = (rotary.rotate(y, rotation, config.rope_interleaved) for y in (q, k))
    return q, k, v


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def _finish(config, w, x, attended):
    """The block after attention: output projection and feed-forward layer, each added to the stream."""
    out = lambda name, y: y if config.norms == "pre" else _norm(config, w, name, y)
    x = x + out("attn_out_norm", _linear("bthc,hcd->btd", attended, w, "wo"))
    h = x if config.norms == "post" else _norm(config, w, "mlp_norm", x)
    up, activation = _linear("btd,df->btf", h, w, "up"), ACTIVATIONS[config.activation]
    h = activation(_linear("btd,df->btf", h, w, "gate")) * up if config.gated else activation(up)
    return x + out("mlp_out_norm", _linear("btf,fd->btd", h, w, "down"))


def hidden(config: Config, params, tokens, seen, cache=None):
    """The last hidden states, normed: [B, T, d], and the cache with these tokens appended (None without one).

    Arguments as ``apply``.
    """
    checks.shapes(tokens=(tokens, "B T"), seen=(seen, "B T"))
    (B, T), start = seen.shape, 0 if cache is None else cache["end"]
    all_seen = seen if cache is None else jax.lax.dynamic_update_slice(cache["seen"], seen, (0, start))
    S = all_seen.shape[1]
    position = jax.lax.dynamic_slice(jnp.cumsum(all_seen, 1) - 1, (0, start), (B, T))
    position = jnp.maximum(position, 0)
    x = params["embed"][tokens]
    if config.embed_scale != 1:
        x = x * jnp.asarray(config.embed_scale, x.dtype)  # rounded to the type of the weights, as Gemma does
    if config.learned_positions:
        x = x + params["positions"].astype(x.dtype)[jnp.minimum(position, config.max_length - 1)]
    behind = start + jnp.arange(T)[:, None] - jnp.arange(S)[None]  # [T, S] how far back a key is
    of_layer = _per_layer(config, position, all_seen, behind)

    if cache is None:

        def block(x, xs):
            w, choice = xs
            rotation, visible, scale = of_layer(choice)
            q, k, v = _qkv(config, w, x, rotation)
            attended = attention.attend(q, k, v, visible, scale=scale, softcap=config.attention_softcap)
            return _finish(config, w, x, attended), None

        x, _ = jax.lax.scan(block, x, (params["layers"], _choices(config)))
        return _norm(config, params, "norm", x), None

    # The cache travels in the carry and is written in place; as xs and ys of the scan it would be copied whole.
    def cached_block(carry, xs):
        x, k_all, v_all = carry
        i, w, choice = xs
        rotation, visible, scale = of_layer(choice)
        q, k, v = _qkv(config, w, x, rotation)
        k_all = jax.lax.dynamic_update_slice(k_all, k[None].astype(k_all.dtype), (i, 0, start, 0, 0))
        v_all = jax.lax.dynamic_update_slice(v_all, v[None].astype(v_all.dtype), (i, 0, start, 0, 0))
        k, v = (jax.lax.dynamic_index_in_dim(z, i, keepdims=False).astype(x.dtype) for z in (k_all, v_all))
        attended = attention.attend(q, k, v, visible, scale=scale, softcap=config.attention_softcap)
        return (_finish(config, w, x, attended), k_all, v_all), None

    xs = jnp.arange(config.layers), params["layers"], _choices(config)
    (x, k, v), _ = jax.lax.scan(cached_block, (x, cache["k"], cache["v"]), xs)
    return _norm(config, params, "norm", x), {"k": k, "v": v, "seen": all_seen, "end": start + T}


def _choices(config):
    """What differs from layer to layer, as arrays [L] that the scan hands to each; nothing where nothing does."""
    choice = {}
    if len(set(config.windows)) > 1:
        choice["window"] = np.int32(config.windows)
    if not config.learned_positions and (tables := rotary.of_layers(config)) is not None:
        choice["rotation"] = tables
    if config.scale_by_layer:
        choice["scale"] = 1 / np.arange(1, config.layers + 1, dtype=np.float32)
    return choice


def _per_layer(config, position, seen, behind):
    """A function of a layer's choice: its rotation (or None), what is visible [B, 1, T, S], and its scale."""
    rotations = None if config.learned_positions else rotary.tables(config, position, seen.shape[1])
    causal = seen[:, None, None, :] & (behind >= 0)[None, None]
    common = config.windows[0] if config.windows else 0
    scale = config.head_width**-0.5 if config.attention_scale is None else config.attention_scale

    def of_layer(choice):
        window = choice.get("window", common)
        visible = causal
        if "window" in choice:
            visible = causal & ((behind < window) | (window == 0))[None, None]
        elif common:
            visible = causal & (behind < common)[None, None]
        table = choice.get("rotation", 0)
        rotation = None if rotations is None else tuple(x[table] for x in rotations)
        return rotation, visible, scale * choice["scale"] if "scale" in choice else float(scale)

    return of_layer


def unembed(config: Config, params, x):
    """Hidden states [B, T, d] -> logits [B, T, V]."""
    logits = _product("btd,vd->btv", x, params["embed"] if config.tied else params["unembed"])
    cap = config.logit_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


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
