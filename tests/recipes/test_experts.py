"""Any recipe with what is asked of routers: the sum is right, routers learn, parts add up; the sampler's choices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import jit, padded, rows, weights

from pt_jax import weights as weighing
from pt_jax.models import bind, decoder, routing
from pt_jax.models.config import Config
from pt_jax.recipes import dpo, experts, grpo, sft
from pt_jax.sampling import Sampling, sample
from pt_jax.training import init_state, make_train_step

CONFIG = Config(
    vocab=29, layers=2, width=20, heads=6, kv_heads=2, head_width=4, hidden=18, rope_base=5e5, eps=1e-2, tied=False,
    experts=5, experts_per_token=2, expert_hidden=11,
)  # fmt: skip
BALANCE, Z = 0.3, 0.05


def sft_batch():
    tokens, seen, _ = padded(rows(), lambda n: n // 2)
    mask = seen & (np.cumsum(seen, 1) > 1)
    return {"tokens": tokens, "seen": seen, "mask": mask, "weights": np.asarray(weighing.token_mean(jnp.asarray(mask)))}


def dpo_batch():
    sides = [sft_batch(), sft_batch()]
    sides[1]["tokens"] = (sides[1]["tokens"] + 3) % CONFIG.vocab
    refs = {f"ref_{side}": np.float32([-9, -8, -1, -6]) for side in ("chosen", "rejected")}
    return dict(zip(("chosen", "rejected"), sides)) | refs | {"weights": np.full(4, 0.25, np.float32)}


RECIPES = {"sft": (sft.make_loss, sft_batch), "dpo": (dpo.make_loss, dpo_batch)}
EACH = pytest.mark.parametrize("recipe", RECIPES)


def compiled(loss_fn):
    return jit(jax.value_and_grad(lambda params, batch: loss_fn(params, None, batch, jax.random.key(0)), has_aux=True))


@functools.cache
def plain(recipe):
    make_loss, make_batch = RECIPES[recipe]
    return compiled(make_loss(bind(CONFIG).apply))(weights(CONFIG), make_batch())


@functools.cache
def routed(recipe):
    make_loss, make_batch = RECIPES[recipe]
    loss_fn = experts.with_experts(make_loss, CONFIG, balance=BALANCE, z=Z)
    return compiled(loss_fn)(weights(CONFIG), experts.weigh_routers(make_batch()))


def sides(batch):
    return [batch] if "tokens" in batch else [batch["chosen"], batch["rejected"]]


def by_hand(params, batch):
    """The terms from the routing of the rows, each weighed with its share of the tokens."""
    tokens, seen = (np.concatenate([side[name] for side in sides(batch)]) for name in ("tokens", "seen"))
    logits = decoder.forward(CONFIG, params, tokens, seen).routing.logits
    w = seen / seen.sum()
    uneven = routing.balance(logits, seen, per_token=2).sum(0) @ w.sum(1)
    large = (routing.z(logits, seen).sum(0) * w).sum()
    return BALANCE * uneven + Z * large, (uneven, large)


@EACH
def test_the_loss_is_the_recipes_and_the_terms(recipe):
    (expected, _), before = plain(recipe)
    (loss, metrics), after = routed(recipe)
    batch = RECIPES[recipe][1]()
    (terms, (uneven, large)), gradient = jit(jax.value_and_grad(lambda p: by_hand(p, batch), has_aux=True))(
        weights(CONFIG)
    )
    np.testing.assert_allclose(loss, expected + terms, rtol=1e-5)
    np.testing.assert_allclose(metrics["router/balance"], uneven / 2, rtol=1e-5)  # a mean over the two layers
    np.testing.assert_allclose(metrics["router/z"], large / 2, rtol=1e-5)
    for a, b, c in zip(*map(jax.tree.leaves, (after, before, gradient))):
        np.testing.assert_allclose(a, b + c, rtol=0, atol=2e-5 * np.abs(b + c).max())
    assert np.abs(gradient["layers"]["router"]).max() > 1e-3
    used = 2 * sum(side["seen"].sum() for side in sides(batch))
    np.testing.assert_array_equal(np.asarray(metrics["router/loads"]).sum((0, 2)), [used] * 2)


def test_weights_of_0_change_nothing_but_the_metrics():
    loss_fn = compiled(experts.with_experts(sft.make_loss, CONFIG))
    (expected, known), before = plain("sft")
    for batch in (sft_batch(), experts.weigh_routers(sft_batch())):
        (loss, metrics), gradient = loss_fn(weights(CONFIG), batch)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        more = {"router/balance", "router/z", "router/loads"} if "router_weights" in batch else set()
        assert metrics.keys() - known.keys() == more
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(before)):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(np.abs(b).max(), 1))


@pytest.mark.parametrize(("recipe", "microbatches"), [("sft", 1), ("sft", 2), ("sft", 4), ("dpo", 2)])
def test_parts_of_a_batch_add_up(recipe, microbatches):
    make_loss, make_batch = RECIPES[recipe]
    (loss, whole), gradient = routed(recipe)
    loss_fn = experts.with_experts(make_loss, CONFIG, balance=BALANCE, z=Z)
    step = make_train_step(loss_fn, optax.sgd(0.1), microbatches=microbatches)
    state = init_state(weights(CONFIG), optax.sgd(0.1), jax.random.key(0))
    state, metrics = step(state, None, experts.weigh_routers(make_batch()))
    for a, b, g in zip(*map(jax.tree.leaves, (state.params, weights(CONFIG), gradient))):
        np.testing.assert_allclose(a, b - 0.1 * g, rtol=0, atol=1e-5)
    for name, expected in (("loss", loss), *((name, whole[name]) for name in ("router/balance", "router/z"))):
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-5)
    np.testing.assert_array_equal(np.sum(metrics["router/loads"], 0), np.sum(whole["router/loads"], 0))


def test_each_row_weighs_what_the_rule_says():
    batch = experts.weigh_routers(sft_batch(), weigh=weighing.sequence_mean)
    np.testing.assert_allclose(batch["router_weights"].sum(1), 0.25, rtol=1e-6)
    assert (batch["router_weights"][~batch["seen"]] == 0).all()
    pairs = experts.weigh_routers(dpo_batch())["router_weights"]
    assert pairs.shape == (4, 2, 12) and pairs.sum() == pytest.approx(1)
    packed = sft_batch()
    numbers = packed["seen"] * np.int32(7)
    for seen in (numbers, np.stack([numbers, numbers], -1)):  # texts by number, and branches of them
        again = experts.weigh_routers(packed | {"seen": seen})["router_weights"]
        np.testing.assert_array_equal(again, experts.weigh_routers(packed)["router_weights"])


# ---- the sampler's choices


@functools.cache
def sampled():
    """Two answers to each of three prompts, by a model whose routers were other than the trainer's are."""
    tokens, seen, _ = padded(rows()[:3], lambda n: n)
    prompts, seen = tokens[:, -5:], seen[:, -5:]
    router = weights(CONFIG)["layers"]["router"]
    noise = np.random.default_rng(2).normal(size=router.shape).astype(np.float32)
    params = weights(CONFIG) | {"layers": weights(CONFIG)["layers"] | {"router": router + 0.3 * noise}}
    bound = bind(CONFIG)
    out = sample(
        params, prompts, seen, jax.random.key(1), apply=bound.apply, init_cache=bound.init_cache, length=9,
        end_tokens=[4, 9, 11], pad_token=4, group=2, how=Sampling(), keep=["routes"],
    )  # fmt: skip
    batch = grpo.make_batch(prompts, seen, out, np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    return params, out, batch | {"routes": experts.routes_of(out)}


def test_routes_lie_as_the_training_array_does():
    params, out, batch = sampled()
    routes, alive = batch["routes"], np.asarray(out.alive)
    assert routes.shape == (6, 14, 2, 2) and not alive.all()
    expected = decoder.forward(CONFIG, params, batch["tokens"], batch["seen"]).routing.choices
    read = batch["seen"].copy()
    last = alive.sum(1) + 4  # drawn, and not read any more
    read[np.arange(6), last] = False
    np.testing.assert_array_equal(routes[read], np.moveaxis(np.asarray(expected), 0, 2)[read])
    assert (routes[np.arange(14) >= last[:, None]] == -1).all()


def test_the_trainer_computes_with_the_experts_of_the_sampler():
    """Though its own routers, nearly flat, would choose others."""
    params, _, batch = sampled()
    flat = params | {"layers": params["layers"] | {"router": params["layers"]["router"] * 1e-7}}
    loss_fn = jit(lambda p, b: experts.with_experts(grpo.make_loss, CONFIG)(p, None, b, jax.random.key(0)))
    _, same = loss_fn(params, batch)
    mask = batch["mask"]
    np.testing.assert_allclose(np.asarray(same["logps"])[mask], batch["old_logps"][mask], rtol=0, atol=1e-5)
    with_routes = loss_fn(flat, batch)[1]["logps"]
    routes = np.moveaxis(batch["routes"], 2, 0)
    x = decoder.forward(CONFIG, flat, batch["tokens"], batch["seen"], routes=routes)
    read = batch["routes"][..., 0, 0] >= 0
    np.testing.assert_array_equal(np.moveaxis(np.asarray(x.routing.choices), 0, 2)[read], batch["routes"][read])
    without = loss_fn(flat, {name: y for name, y in batch.items() if name != "routes"})[1]["logps"]
    assert np.abs(np.asarray(with_routes) - np.asarray(without))[mask].max() > 0.01


def test_replayed_parts_add_up():
    _, _, batch = sampled()
    batch = experts.weigh_routers(batch)
    loss_fn = experts.with_experts(grpo.make_loss, CONFIG, balance=BALANCE)
    outcomes = []
    for microbatches in (1, 3):
        step = make_train_step(loss_fn, optax.sgd(0.1), microbatches=microbatches)
        state, metrics = step(init_state(weights(CONFIG), optax.sgd(0.1), jax.random.key(0)), None, batch)
        outcomes.append(state.params)
        counted = np.sum(np.asarray(metrics["router/loads"]), 0)
    for a, b in zip(*map(jax.tree.leaves, outcomes)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    assert (counted.sum(-1) == 2 * batch["seen"].sum()).all()


# ---- mistakes


def test_what_is_missing_is_a_sentence():
    key, params = jax.random.key(0), weights(CONFIG)
    with pytest.raises(ValueError, match=r"^config has no experts"):
        experts.with_experts(sft.make_loss, dataclasses.replace(CONFIG, experts=0, expert_layers=()))
    loss_fn = functools.partial(jax.eval_shape, experts.with_experts(sft.make_loss, CONFIG, z=0.1))
    with pytest.raises(ValueError, match=r"^batch lacks router_weights.* weigh_routers"):
        loss_fn(params, None, sft_batch(), key)
    batch = experts.weigh_routers(sft_batch())
    with pytest.raises(ValueError, match=r"^batch\['router_weights'\] has shape \(4, 11\), but .* rows of \(4, 12\)"):
        loss_fn(params, None, batch | {"router_weights": batch["router_weights"][:, 1:]}, key)
    with pytest.raises(ValueError, match=r"^batch\['routes'\] has shape \(4, 11, 2, 2\), but"):
        loss_fn(params, None, batch | {"routes": np.zeros((4, 11, 2, 2), np.int32)}, key)
    with pytest.raises(ValueError, match="K=2 experts a token"):
        loss_fn(params, None, batch | {"routes": np.zeros((4, 12, 2, 3), np.int32)}, key)

    def twice(apply):
        def loss_fn(params, frozen, batch, key):
            return sum(apply(params, batch["tokens"], batch["seen"])[0].sum() for _ in range(2)), {}

        return loss_fn

    with pytest.raises(ValueError, match="called apply 2 times"):
        jax.eval_shape(experts.with_experts(twice, CONFIG, balance=0.1), params, None, batch, key)


def test_a_reference_that_the_recipe_asks_as_well_is_left_alone():
    def against_reference(apply):
        def loss_fn(params, frozen, batch, key):
            other = apply(frozen, batch["tokens"], batch["seen"])[0]
            return (apply(params, batch["tokens"], batch["seen"])[0] - other).sum(where=batch["seen"][..., None]), {}

        return loss_fn

    batch = experts.weigh_routers(sft_batch())
    reference = jax.tree.map(lambda x: 1.1 * x, weights(CONFIG))
    loss_fn = experts.with_experts(against_reference, CONFIG, balance=BALANCE)
    loss, _ = loss_fn(weights(CONFIG), reference, batch, jax.random.key(0))
    plain, _ = against_reference(bind(CONFIG).apply)(weights(CONFIG), reference, batch, jax.random.key(0))
    _, (uneven, _) = by_hand(weights(CONFIG), sft_batch())
    np.testing.assert_allclose(loss, plain + BALANCE * uneven, rtol=1e-4)
