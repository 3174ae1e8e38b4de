"""Mixtures of experts: a router chooses a few feed-forward networks for each token.

    p = softmax(h W_router);   chosen = the k experts of the largest p (plus the router's bias, where there is one);
    y = sum over chosen e of w_e expert_e(h) + shared(h),   w = p, or p / max(sum over chosen p, floor)

Shazeer et al. 2017, https://arxiv.org/abs/1701.06538; Mixtral, https://arxiv.org/abs/2401.04088, section 2.1. The rows
of one expert are laid side by side and multiplied group by group. They are put back by the inverse permutation and
summed in a fixed order: an addition into scattered rows would not be the same from run to run on a GPU.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pt_jax.models import linear
from pt_jax.models.config import Config


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
    K = config.experts_per_token
    choices, share, logits = route(config, w, h, choices)
    expert = choices.reshape(-1)
    order = jnp.argsort(expert, stable=True)  # row i of the sorted ones is token order[i] // K
    inverse = jnp.argsort(order)
    sizes = jnp.sum(expert[:, None] == jnp.arange(config.experts)[None], 0, dtype=jnp.int32)
    rows = jnp.broadcast_to(h[:, None], (h.shape[0], K, h.shape[1])).reshape(-1, h.shape[1])
    rows = _permuted(rows, order, inverse)
    gate, up = (linear.grouped(rows, w[name], sizes) for name in ("expert_gate", "expert_up"))
    out = linear.grouped(activation(gate) * up, w["expert_down"], sizes)
    out = _permuted(out, inverse, order).reshape(h.shape[0], K, -1)
    return jnp.sum(share.astype(out.dtype)[:, :, None] * out, 1), choices, logits
