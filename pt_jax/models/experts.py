"""Mixtures of experts: a router chooses a few feed-forward networks for each token.

    p = softmax(h W_router);   chosen = the k experts of the largest p (plus the router's bias, where there is one);
    y = sum over chosen e of w_e expert_e(h) + shared(h),   w = p, or p / max(sum over chosen p, floor)

Shazeer et al. 2017, https://arxiv.org/abs/1701.06538; Mixtral, https://arxiv.org/abs/2401.04088, section 2.1. The rows
of one expert are laid side by side and multiplied group by group. They are put back by the inverse permutation and
summed in a fixed order: an addition into scattered rows would not be the same from run to run on a GPU.

On a mesh (``meshes``) each device routes its own tokens, and of those of the devices along ``expert`` it computes what
its own experts add: hidden states are gathered, and the sums go back to where the tokens lie. That is exact however
uneven the choices are, in arrays of fixed sizes; sending each token to its experts alone would need room for all tokens
at one device as well. Of n devices each receives n - 1 times its own hidden states, and sends as much back, where an
exchange of what is chosen alone would be K (n - 1) / n times; and it has room for K n times its own, for one layer.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from pt_jax.models import linear, meshes
from pt_jax.models.config import Config
from pt_jax.models.parameters import PRODUCTS


class Routing(NamedTuple):
    """What the routers of the layers with experts did; M is the number of these layers.

    Args:
      logits: [M, B, T, E] float32, before the softmax.
      choices: [M, B, T, K] int32, the experts that were used, heaviest first.
    """

    logits: jax.Array
    choices: jax.Array


@jax.custom_vjp
def _permuted(x, order, inverse):
    """x[order]; its gradient is the inverse permutation, which JAX would write as an addition into scattered rows."""
    return x[order]


def _permuted_forward(x, order, inverse):
    return x[order], inverse


def _permuted_backward(inverse, g):
    return g[inverse], None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)


def check_routes(config: Config, routes) -> None:
    """Fails unless routes [M, B, T, K] are of a model with such experts."""
    layers, per_token = sum(config.has_experts), config.experts_per_token
    if not layers:
        raise ValueError("routes are given, but this model has no experts")
    if routes.shape[0] != layers or routes.shape[3] != per_token:
        raise ValueError(
            f"routes has shape {routes.shape}, expected [M, B, T, K] with M={layers} layers that have experts and "
            f"K={per_token} experts a token"
        )


def route(config: Config, w, h, choices=None):
    """The experts of each token and their weights.

    Args:
      config: the model.
      w: weights of a layer.
      h: [N, d].
      choices: [N, K] int32 to use instead of the router's own, such as those of the sampler; -1, or None: its own.

    Returns:
      choices [N, K], weights [N, K] float32, logits [N, E] float32.
    """
    with jax.default_matmul_precision("highest"):  # TPUs and GPUs would round the factors first
        logits = linear.einsum("nd,de->ne", h.astype(jnp.float32), w["router"])
    p = jax.nn.softmax(logits)
    preference = p + w["router_bias"].astype(jnp.float32)[None] if config.router_bias else p
    own = jax.lax.top_k(jax.lax.stop_gradient(preference), config.experts_per_token)[1]
    choices = own if choices is None else jnp.where(choices < 0, own, choices)
    chosen = jnp.sum(p[:, None] * jax.nn.one_hot(choices, config.experts), -1)
    if config.norm_experts:
        chosen = chosen / jnp.maximum(chosen.sum(-1, keepdims=True), config.expert_floor)
    return choices, chosen, logits


def mixture(config: Config, w, h, activation, choices=None):
    """The sum of each token's experts.

    Args:
      config: the model.
      w: weights of a layer.
      h: [N, d].
      activation: of the feed-forward networks.
      choices: see ``route``.

    Returns:
      [N, d], choices [N, K], logits [N, E].
    """
    choices, share, logits = route(config, w, h, choices)
    return combined(w, h, choices, share, activation, config.experts), choices, logits


def combined(w, h, choices, share, activation, experts):
    """The weighted sum of each token's experts, of those numbered from 0 to ``experts``; others add nothing.

    Args:
      w: weights of these experts.
      h: [N, d].
      choices: [N, K] int32.
      share: [N, K], what each weighs.
      activation: of the feed-forward networks.
      experts: how many.
    """
    N, K = choices.shape
    expert = jnp.where((choices >= 0) & (choices < experts), choices, experts).reshape(-1)
    order = jnp.argsort(expert, stable=True)  # row i of the sorted ones is token order[i] // K
    inverse = jnp.argsort(order)
    sizes = jnp.sum(expert[:, None] == jnp.arange(experts)[None], 0, dtype=jnp.int32)
    rows = jnp.broadcast_to(h[:, None], (N, K, h.shape[1])).reshape(-1, h.shape[1])
    # what is behind the last group is nobody's, and kernels differ in what they write there
    theirs = (jnp.arange(N * K) < sizes.sum())[:, None]
    rows = jnp.where(theirs, _permuted(rows, order, inverse), 0)
    gate, up = (linear.grouped(rows, w[name], sizes) for name in ("expert_gate", "expert_up"))
    out = jnp.where(theirs, linear.grouped(activation(gate) * up, w["expert_down"], sizes), 0)
    out = _permuted(out, inverse, order).reshape(N, K, -1)
    return jnp.sum(share.astype(out.dtype)[:, :, None] * out, 1)


WEIGHTS = ("expert_gate", "expert_up", "expert_down")


@struct.dataclass
class _Split(linear.Weight):
    """A weight of which each device has a part, put together for a product and forgotten.

    Args:
      w: the part.
      at: the axis that ``fsdp`` splits.
    """

    w: Any
    at: int = struct.field(pytree_node=False)

    def grouped(self, x, sizes):
        whole = lambda w, x, sizes: linear.grouped(x, meshes.gathered(w, "fsdp", self.at), sizes)
        return jax.checkpoint(whole)(self.w, x, sizes)


class _Axes(NamedTuple):
    """Axes of the mesh that split what is computed, each an entry of a PartitionSpec."""

    rows: tuple | None
    context: str | None
    expert: str | None
    tensor: str | None


def of_rows(config: Config, w, h, activation, choices=None):
    """``mixture`` of the tokens of rows; on a mesh, each device those that lie on it.

    Args:
      config, w, activation: as ``mixture``.
      h: [B, T, d].
      choices: [B, T, K], or None.

    Returns:
      [B, T, d], choices [B, T, K], logits [B, T, E].
    """
    flat = lambda x: x.reshape(-1, x.shape[-1])

    def by(of_tokens):
        return lambda w, h, *given: tuple(x.reshape(*h.shape[:2], -1) for x in of_tokens(w, flat(h), *map(flat, given)))

    given = () if choices is None else (choices,)
    if not meshes.sizes():
        return by(lambda w, h, *given: mixture(config, w, h, activation, *given))(w, h, *given)
    w = {name: w[name] for name in (*WEIGHTS, "router", "router_bias") if name in w}
    arrays = not any(isinstance(w[name], linear.Weight) for name in WEIGHTS)
    axes = _Axes(
        meshes.rows(len(h)), meshes.splits("context", h.shape[1]), meshes.splits("expert", config.experts),
        meshes.splits("tensor", config.expert_hidden) if arrays else None,
    )  # fmt: skip
    specs = {name: _specs(config, name, w[name], axes) for name in w}
    of_tokens = lambda w, h, *given: _exchanged(config, w, h, activation, axes, specs, *given)
    tokens = P(axes.rows, axes.context)
    each = meshes.on_each(by(of_tokens), (specs, tokens, *(tokens for _ in given)), (tokens, tokens, tokens))
    return each(w, h, *given)


def _specs(config, name, w, axes):
    """Where a device's part of a weight lies: its experts; of an array also along the other axes that are split."""
    if name not in WEIGHTS:
        return P()
    if isinstance(w, linear.Weight):
        return jax.tree.map(lambda x: P(axes.expert) if x.shape[:1] == (config.experts,) else P(), w)
    letters = linear.sides(PRODUCTS[name]).weight
    fsdp = meshes.splits("fsdp", w.shape[letters.index("d")])
    return P(*({"e": axes.expert, "d": fsdp, "f": axes.tensor}[letter] for letter in letters))


def _exchanged(config, w, h, activation, axes, specs, choices=None):
    """``mixture`` of a device's tokens [n, d], by the experts of all devices along the axis ``expert``."""
    choices, share, logits = route(config, w, h, choices)
    devices = 1 if axes.expert is None else jax.lax.axis_size(axes.expert)
    first = 0 if devices == 1 else jax.lax.axis_index(axes.expert) * (config.experts // devices)
    travels = devices > 1 and axes.rows is not None  # rows that do not divide are everywhere already
    w = {name: _Split(x, list(specs[name]).index("fsdp")) if _is_split(specs[name]) else x for name, x in w.items()}
    all_h, to, shares = (meshes.gathered(x, axes.expert if travels else None, 0) for x in (h, choices, share))
    y = combined(w, all_h, to - first, shares, activation, config.experts // devices)
    if travels:
        y = jax.lax.psum_scatter(y, axes.expert, tiled=True)
    added = [axis for axis in (None if travels else axes.expert, axes.tensor) if axis is not None]
    return jax.lax.psum(y, added) if added else y, choices, logits


def _is_split(spec):
    return isinstance(spec, P) and "fsdp" in spec and jax.lax.axis_size("fsdp") > 1
