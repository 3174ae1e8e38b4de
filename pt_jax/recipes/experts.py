"""Training mixtures of experts with any recipe: losses of the routers, and the sampler's choices of experts again.

loss_fn = experts.with_experts(sft.make_loss, config, balance=1e-2, z=1e-3)
batch = experts.weigh_routers(batch)
"""

import math

import jax.numpy as jnp
import numpy as np

from pt_jax import weights
from pt_jax.models import decoder, routing
from pt_jax.models.config import DEFAULT, Config


def with_experts(make_loss, config: Config, *, how=DEFAULT, balance=0.0, z=0.0):
    """The loss of a recipe, plus what is asked of the routers, with the sampler's experts where the batch has them.

        loss = recipe + balance sum over layers, rows of w balance + z sum over layers, tokens of w z

    w are the batch's ``router_weights``, from ``weigh_routers``; a row's is the sum over its tokens. With ``routes`` in
    the batch, from ``routes_of``, each token goes to the experts that it went to when it was sampled, and only how much
    they weigh is the trainer's: Ma et al. 2025, https://arxiv.org/abs/2510.11370 (rollout routing replay).

    Args:
      make_loss: apply -> loss, such as ``sft.make_loss`` or ``partial(grpo.make_loss, kl=0.1)``. The loss must call
        apply once with its own params, and not inside a transformation of its own.
      config: a model with experts.
      how: see ``models.Execution``.
      balance: weight of ``routing.balance``.
      z: weight of ``routing.z``.

    Returns:
      A loss for ``make_train_step``. Its metrics are the recipe's and, where the batch has ``router_weights``,
      ``router/balance`` and ``router/z``, means over layers, and ``router/loads`` [B', M, E] for
      ``routing.load_metrics``; B' are the rows that the recipe computes.

    Raises:
      ValueError: the model has no experts; or, when called, the batch lacks what is needed.
    """
    layers = sum(config.has_experts)
    if not layers:
        raise ValueError("config has no experts, so there are no routers to ask anything of")

    def loss_fn(params, frozen, batch, key):
        calls = []

        def apply(given, tokens, seen, cache=None):
            mine = given is params  # and not a reference
            routes = _rows(batch, "routes", tokens.shape, 2) if mine and "routes" in batch else None
            routes = None if routes is None else jnp.moveaxis(routes, 2, 0)
            out = decoder.forward(config, given, tokens, seen, cache, how=how, routes=routes)
            if mine:
                calls.append((out.routing, seen))
            return decoder.unembed(config, given, out.hidden), out.cache

        loss, metrics = make_loss(apply)(params, frozen, batch, key)
        if "router_weights" not in batch:
            if not _is_zero(balance) or not _is_zero(z):
                raise ValueError("batch lacks router_weights, which balance and z need: make them with weigh_routers")
            return loss, metrics
        if len(calls) != 1:
            raise ValueError(
                f"the recipe called apply {len(calls)} times with its params; router losses are of one call"
            )
        ((routed, seen),) = calls
        w = _rows(batch, "router_weights", seen.shape[:2], 0)
        mask = _real(seen)
        uneven = routing.balance(routed.logits, mask, per_token=config.experts_per_token).sum(0)
        uneven = weights.weighted_sum(uneven, w.sum(1))
        large = weights.weighted_sum(routing.z(routed.logits, mask).sum(0), w)
        metrics = metrics | {
            "router/balance": uneven / layers,
            "router/z": large / layers,
            "router/loads": routing.loads(routed.choices, mask, config.experts),
        }
        return loss + balance * uneven + z * large, metrics

    return loss_fn


def _is_zero(x):
    return isinstance(x, int | float) and x == 0


def _real(seen):
    """What is no padding, of any form of ``seen``."""
    return (seen if seen.ndim == 2 else seen[..., 0]) != 0


def _rows(batch, name, shape, trailing):
    """An entry of the batch with a row for each row that the recipe computes: those of a pair lie side by side."""
    x = batch[name]
    wanted = (*shape, *x.shape[x.ndim - trailing :])
    if x.size != math.prod(wanted):
        raise ValueError(f"batch[{name!r}] has shape {x.shape}, but the recipe computes rows of {shape}")
    return x.reshape(wanted)


def weigh_routers(batch, *, weigh=weights.token_mean) -> dict:
    """A batch with ``router_weights``: what each token that is no padding weighs in the losses of the routers.

    Args:
      batch: of a recipe: with "seen" [B, T], or with pairs, each "chosen" and "rejected" with its own.
      weigh: mask -> weights, over the whole batch; ``sequence_mean`` counts every row alike.

    Returns:
      The batch, with router_weights [B, T], or [B, 2, T] of pairs.
    """
    sides = [batch] if "seen" in batch else [batch["chosen"], batch["rejected"]]
    mask = np.stack([_real(np.asarray(side["seen"])) for side in sides], 1)  # [B, 1 or 2, T]
    w = np.asarray(weigh(jnp.asarray(mask.reshape(-1, mask.shape[-1])))).reshape(mask.shape)
    return batch | {"router_weights": w[:, 0] if "seen" in batch else w}


def routes_of(completions):
    """The experts that each token of prompts and completions went to, as a batch has them.

    Args:
      completions: ``sampling.Completions`` of ``sample(..., keep=["routes"])``.

    Returns:
      [B, T + N, M, K] int32, to be the batch's ``routes``: of M layers that have experts, K experts a token. -1, the
      trainer's own choice, from each row's last token on: the sampler draws it and does not read it.
    """
    routes, alive = np.array(completions.kept["routes"]), np.asarray(completions.alive)
    routes = np.moveaxis(routes, 0, 2).copy()
    read = np.pad(alive[:, 1:], ((0, 0), (routes.shape[1] - alive.shape[1], 1)), constant_values=False)
    read[:, : routes.shape[1] - alive.shape[1]] = True
    routes[~read] = -1
    return routes
