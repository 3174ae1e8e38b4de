"""A decoder as functions over a dict of arrays: one program for every family, chosen by ``Config``.

Letters and the parameter tree are those of ``parameters``. Layers are stacked on axis 0 and scanned, so that compile
time does not grow with depth; where layers of different kinds follow each other, each run of one kind is a scan of its
own (``runs``).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pt_jax import checks
from pt_jax.models import attention, experts, linear, meshes, parameters, rotary, runs, visibility
from pt_jax.models import cache as caches
from pt_jax.models.config import DEFAULT, Config, Execution


class Output(NamedTuple):
    """What ``forward`` computes.

    Args:
      hidden: [B, T, d] the last hidden states, normed.
      cache: with these tokens appended; None without one.
      routing: ``experts.Routing`` of the layers with experts; None without experts.
    """

    hidden: jax.Array
    cache: dict | None
    routing: experts.Routing | None


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


def _linear(x, w, name):
    """The product with a weight, and its bias where there is one."""
    y = linear.einsum(parameters.PRODUCTS[name], x, w[name])
    bias = w.get(f"{name}_bias")
    return y if bias is None else y + _over(y, bias.astype(y.dtype), bias.ndim)


def _qkv(config, w, x, rotation):
    """Queries, keys and values of a block's input, rotated to their positions (``rotation`` None: not rotated)."""
    h = x if config.norms == "post" else _norm(config, w, "attn_norm", x)
    q, k, v = (_linear(h, w, name) for name in ("wq", "wk", "wv"))
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


def _network(config, w, h, prefix=""):
    """One feed-forward network."""
    activation, up = ACTIVATIONS[config.activation], _linear(h, w, f"{prefix}up")
    h = activation(_linear(h, w, f"{prefix}gate")) * up if config.gated else activation(up)
    return _linear(h, w, f"{prefix}down")


def _feed_forward(config, w, h, has_experts, route):
    """The network of a layer, or its experts; and their ``Routing``, or None."""
    if not has_experts:
        return _network(config, w, h), None
    y, choices, logits = experts.of_rows(config, w, h, ACTIVATIONS[config.activation], route)
    y = y + _network(config, w, h, "shared_") if config.shared_hidden else y
    return y, experts.Routing(logits, choices)


def _finish(config, w, x, attended, has_experts, route):
    """The block after attention: output projection and feed-forward layer, each added to the stream."""
    out = lambda name, y: y if config.norms == "pre" else _norm(config, w, name, y)
    x = meshes.laid(x + out("attn_out_norm", _linear(attended, w, "wo")))
    h = x if config.norms == "post" else _norm(config, w, "mlp_norm", x)
    y, routing = _feed_forward(config, w, h, has_experts, route)
    return meshes.laid(x + out("mlp_out_norm", y)), routing


def forward(config: Config, params, tokens, seen, cache=None, *, how=DEFAULT, routes=None) -> Output:
    """The last hidden states, and what came about on the way.

    Args:
      config, params, tokens, seen, cache, how: as ``apply``.
      routes: [M, B, T, K] int32, which experts to use instead of those that the routers would choose, such as the
        sampler's (``cache["routes"]``), so that the trainer computes what the sampler computed; -1, or None: their own.

    Raises:
      ValueError: the shapes disagree, or texts are packed and cached at once.
    """
    _check(config, params, tokens, seen, cache, routes)
    dtype = how.dtype or jax.eval_shape(linear.take, params["embed"], tokens).dtype
    name = attention.kernel(config, how.attention, dtype=jnp.dtype(dtype), seen=seen, cached=cache is not None)
    apart = meshes.apart(seen.shape[1])  # whose tokens would have to travel to stand in front
    whole = name in ("cudnn", "splash") and cache is None and (name == "splash" or (seen.dtype == bool and not apart))
    if not whole or seen.dtype != bool or apart:
        return _forward(config, params, tokens, seen, cache, how, routes, name, whole)
    order, back = visibility.to_front(seen)
    tokens, seen = (visibility.arranged(x, order) for x in (tokens, seen))
    routes = None if routes is None else visibility.arranged(routes, order, 1)
    out = _forward(config, params, tokens, seen, None, how, routes, name, whole)
    routing = jax.tree.map(lambda x: visibility.arranged(x, back, 1), out.routing)
    return Output(visibility.arranged(out.hidden, back), None, routing)


def _check(config, params, tokens, seen, cache, routes):
    visibility.check(seen)
    checks.shapes(tokens=(tokens, "B T"), seen=(seen, "B T" if seen.ndim != 3 else "B T two"))
    if routes is not None:
        checks.shapes(tokens=(tokens, "B T"), routes=(routes, "M B T K"))
        experts.check_routes(config, routes)
    if cache is not None and caches.is_by_layer(cache) and not isinstance(params["layers"], tuple):
        raise ValueError("the cache has its layers apart and the weights are stacked; take models.by_layer of them")
    if cache is not None and seen.dtype != bool:
        raise ValueError("seen numbers the texts of packed rows, which have no cache; give a bool, one text a row")


def _forward(config, params, tokens, seen, cache, how, routes, name, whole):
    """``forward`` by the attention ``name``; ``whole``: without a mask, of whole rows with their padding behind."""
    if cache is None:
        view = visibility.sight(seen)
        x = _embedded(config, params, tokens, view.position, how)
        look = _whole_rows(config, seen, name) if whole else _masked(config, view, name)
        x, routing = _through(config, params, x, _per_layer(config, view.position, seen.shape[1], look), how, routes)
    else:
        begun, after = caches.begin(config, cache, seen)
        x = _embedded(config, params, tokens, begun.position, how)
        if begun.lost is not None:
            x = jnp.where(begun.lost[..., None], jnp.asarray(jnp.nan, x.dtype), x)
        x, routing, cache = _through_cache(config, params, x, after, begun, name, routes)
    return Output(_norm(config, params, "norm", x), cache, routing)


def _through(config, params, x, of_layer, how, routes):
    """All layers of whole rows: what comes out, and the routing of those with experts."""
    routings = []
    for run in runs.of(config):

        def block(x, xs, run=run):
            w, choice, route = xs
            rotation, look = of_layer(choice)
            return _finish(config, w, x, look(*_qkv(config, w, x, rotation)), run.has_experts, route)

        block = _rematerialised(block, how)
        if isinstance(params["layers"], tuple):
            for xs in run.one_by_one(config, params["layers"], routes):
                x, routing = block(x, xs)
                routings.append(jax.tree.map(lambda x: x[None], routing))
            continue
        x, routing = jax.lax.scan(block, x, run.xs(config, params["layers"], routes))
        routings.append(routing)
    return x, _together(routings)


def _together(routings):
    """The routing of layers that follow each other, where there is any."""
    routings = [x for x in routings if x is not None]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *routings) if routings else None


def _through_cache(config, params, x, cache, begun, name, routes):
    """All layers of rows that continue a cache: what comes out, the routing, and the cache with the new tokens.

    The cache travels in the carry and is written in place; as xs and ys of the scan it would be copied whole.
    """
    choices, room = runs.choices(config), cache["room"].shape[0]
    prefix = None if cache["prefix"] is None else caches.stacks(cache["prefix"])
    of_layer = {
        kind: _per_layer(config, begun.position, room, _in_cache(config, name, place, kind == "near"))
        for kind, place in begun.places.items()
    }

    def block(carry, layer, has_experts, near):
        (x, stacks), kind = carry, "near" if near else "far"
        w = layer.weights(params["layers"], has_experts)
        rotation, look = of_layer[kind](runs.take(choices, layer.index))
        q, k, v = _qkv(config, w, x, rotation)
        in_front = prefix and prefix[kind]
        stack, parts = caches.append(stacks[kind], layer.of_cache, k, v, begun.places[kind], in_front)
        route = runs.take(routes, layer.of_network) if has_experts else None
        x, routing = _finish(config, w, x, look(q, parts), has_experts, route)
        return (x, stacks | {kind: stack}), routing

    def turn(carry, layers, kinds):
        routings = []
        for kind, run in zip(kinds, layers):
            carry, routing = jax.lax.scan(lambda carry, layer, kind=kind: block(carry, layer, *kind), carry, run)
            routings.append(routing)
        return carry, _together(routings)

    carry, routings = (x, caches.stacks(cache)), []
    for turns in runs.in_cache(config):
        if isinstance(params["layers"], tuple):
            for kind, layer in turns.one_by_one():
                carry, routing = block(carry, layer, *kind)
                routings.append(jax.tree.map(lambda x: x[None], routing))
            continue
        kinds, layers = zip(*turns.runs)
        if turns.times == 1:
            carry, routing = turn(carry, jax.tree.map(lambda x: x[0], layers), kinds)
        else:
            carry, routing = jax.lax.scan(lambda carry, layers, kinds=kinds: turn(carry, layers, kinds), carry, layers)
            routing = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), routing)
        routings.append(routing)
    (x, stacks), routing = carry, _together(routings)
    cache = caches.with_stacks(cache, stacks)
    if routing is not None:
        at = (0, 0, begun.start, 0)
        cache["routes"] = jax.lax.dynamic_update_slice(cache["routes"], routing.choices, at)
    return x, routing, cache


def _rematerialised(block, how):
    if how.remat == "none":
        return block
    policies = jax.checkpoint_policies
    policy = policies.dots_with_no_batch_dims_saveable if how.remat == "dots" else policies.nothing_saveable
    return jax.checkpoint(block, policy=policy, prevent_cse=False)  # a scan's body is not merged with its backward


def _embedded(config, params, tokens, position, how):
    table = params["embed"]
    x = linear.take(table if isinstance(table, linear.Weight) else meshes.gathered_weight(table, "tensor"), tokens)
    if how.dtype is not None:
        x = x.astype(how.dtype)
    if config.embed_scale != 1:
        x = x * jnp.asarray(config.embed_scale, x.dtype)  # rounded to the type of the weights, as Gemma does
    if config.learned_positions:
        # behind the last of them a text has no meaning, and no number that looks like one
        x = x + params["positions"].astype(x.dtype).at[position].get(mode="fill", fill_value=jnp.nan)
    return meshes.laid(x)


def _per_layer(config, position, length, look):
    """A function of a layer's choice: its rotation (or None), and its attention."""
    rotations = None if config.learned_positions else rotary.tables(config, position, length)
    scale = config.head_width**-0.5 if config.attention_scale is None else config.attention_scale

    def of_layer(choice):
        table = choice.get("rotation", 0)
        rotation = None if rotations is None else tuple(x[table] for x in rotations)
        of_scores = scale * choice["scale"] if "scale" in choice else float(scale)
        return rotation, look(choice, scale=of_scores, softcap=config.attention_softcap)

    return of_layer


def _masked(config, view, name):
    """Attention of whole rows to what a mask shows, as a function of a layer's choice."""
    common = config.windows[0] if config.windows else 0
    if meshes.deals(view.visible.shape[2]):
        view = view._replace(visible=meshes.dealt(view.visible, 2), behind=meshes.dealt(view.behind, 2))

    def look(choice, **scores):
        visible = view.visible
        if "window" in choice:
            visible = visible & ((view.behind < choice["window"]) | (choice["window"] == 0))
        elif common:
            visible = visible & (view.behind < common)
        return attention.of_mask(name, visible, **scores)

    return look


def _in_cache(config, name, place, near):
    """Attention of rows that continue a cache to its parts, as a function of a layer's choice."""
    windows = {w for w in config.windows if w}

    def look(choice, **scores):
        window = min(windows) if len(windows) == 1 else choice.get("window")
        visible = [x.visible & (x.behind < window) if near else x.visible for x in place.sights]
        return attention.of_cache(name, visible, **scores)

    return look


def _whole_rows(config, seen, name):
    """Attention of whole rows, whose windows are part of the program: of different ones each layer takes its own."""
    texts = None if seen.dtype == bool and not meshes.apart(seen.shape[1]) else seen.astype(jnp.int32)
    windows = sorted(set(config.windows)) or [0]

    def look(choice, **scores):
        each = [attention.of_window(name, window, texts=texts, **scores) for window in windows]
        if len(each) == 1:
            return each[0]
        which = jnp.searchsorted(np.int32(windows), choice["window"])
        return lambda q, k, v: jax.lax.switch(which, each, q, k, v)

    return look


def hidden(config: Config, params, tokens, seen, cache=None, *, how=DEFAULT):
    """The last hidden states, normed: [B, T, d], and the cache with these tokens appended (None without one).

    Arguments as ``apply``.
    """
    out = forward(config, params, tokens, seen, cache, how=how)
    return out.hidden, out.cache


def unembed(config: Config, params, x):
    """Hidden states [B, T, d] -> logits [B, T, V]."""
    logits = linear.einsum("btd,vd->btv", x, params["embed"] if config.tied else params["unembed"])
    cap = config.logit_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def apply(config: Config, params, tokens, seen, cache=None, *, how=DEFAULT):
    """Logits of the next token at every position.

    Args:
      config: the model; ``bind`` it for functions that take any model.
      params: the tree of ``init`` or ``load``.
      tokens: [B, T] int32.
      seen: [B, T] bool, False for padding, on either side; a position counts the seen tokens before it. Or int32, for
        rows of several texts: 0 for padding, and a number for each text; texts may share their beginnings (see
        ``visibility``).
      cache: None, or from ``init_cache`` with the tokens before these in it.
      how: kernels, rematerialisation, compute type.

    Returns:
      logits [B, T, V] in the type that is computed in, and the cache with these tokens appended (None without one).
      Row t predicts token t + 1. What stands at a position that is not seen has no meaning, and influences nothing.
      Of a text that is longer than the learned positions of its model (GPT-2), not a number.

    Raises:
      ValueError: the shapes disagree, or the model has no unembedding.
    """
    if config.head != "tokens":
        raise ValueError("this model scores texts and has no logits; use models.heads")
    x, cache = hidden(config, params, tokens, seen, cache, how=how)
    return unembed(config, params, x), cache


class Bound(NamedTuple):
    """A model's functions with its config bound, as samplers and losses take them."""

    apply: functools.partial  # (params, tokens, seen, cache=None) -> (logits, cache)
    init_cache: functools.partial  # (rows, length) -> cache


@functools.cache
def bind(config: Config, how: Execution = DEFAULT) -> Bound:
    """``apply`` and ``init_cache`` of a config. The same config gives the same objects, so nothing is traced twice."""
    dtype = jnp.dtype(how.cache_dtype or how.dtype or "float32")
    init_cache = functools.partial(caches.init_cache, config, dtype=dtype, by_layer=how.cache_by_layer)
    return Bound(functools.partial(apply, config, how=how), init_cache)
