"""However many devices work on it and however the weights are split, a step is the same step."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pt_jax import models, weights
from pt_jax.recipes import dpo, grpo, sft
from pt_jax.training import init_state, make_train_step, sharding

MESHES = {"8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "2x2x2": (2, 2, 2)}
ROWS, COLUMNS, VOCAB = 16, 6, 24
LENGTHS = np.array([5, 3, 0, 4, 1, 2, 5, 2, 1, 1, 5, 4, 0, 3, 2, 5])  # scored tokens; no two shards are alike


def toy(params, tokens, seen):
    """A decoder without attention, with names of the table: a step of it compiles in a third of the time."""
    x = params["embed"][tokens] * seen[..., None]
    x = jnp.cumsum(x, 1) / jnp.maximum(jnp.cumsum(seen, 1), 1)[..., None]
    w = jax.tree.map(lambda w: w[0], params["layers"])
    h = jax.nn.silu(jnp.einsum("btd,df->btf", x, w["gate"])) * jnp.einsum("btd,df->btf", x, w["up"])
    x = x + jnp.einsum("btf,fd->btd", h, w["down"])
    x = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-3) * params["norm"][None, None]
    return jnp.einsum("btd,vd->btv", x, params["embed"]), None


# each tensor device has one of the key heads, and the two query heads that it serves
SIZES = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "head_width": 4, "hidden": 16}
CONFIG = models.Config(vocab=VOCAB, **SIZES, qk_norm=False)
LAYER = {"gate": (1, 16, 24), "up": (1, 16, 24), "down": (1, 24, 16)}
TOY = {"embed": (VOCAB, 16), "norm": (16,), "layers": LAYER}
MODELS = {"toy": (toy, TOY), "decoder": (models.bind(CONFIG).apply, models.parameters.shapes(CONFIG))}


def params_of(model):
    rng = np.random.default_rng(0)
    draw = lambda shape: (rng.normal(size=shape) * 0.2 + (len(shape) < 2)).astype(np.float32)
    return jax.tree.map(draw, MODELS[model][1], is_leaf=lambda x: isinstance(x, tuple))


def texts(lengths, seed):
    columns = np.arange(COLUMNS)
    seen = columns <= lengths[:, None]
    tokens = np.random.default_rng(seed).integers(0, VOCAB, seen.shape).astype(np.int32)
    mask = seen & (columns > 0)
    return {"tokens": tokens, "seen": seen, "mask": mask, "weights": np.asarray(weights.sequence_mean(mask))}


def batch_of(method):
    rng = np.random.default_rng(1)
    batch = texts(LENGTHS, 0)
    mask = batch["mask"]
    if method == "dpo":
        nats = lambda: -rng.uniform(3, 15, ROWS).astype(np.float32)
        batch = {"chosen": batch, "rejected": texts(LENGTHS[::-1], 1)}
        batch |= {"ref_chosen": nats(), "ref_rejected": nats()}
        return batch | {"weights": np.asarray(weights.row_mean(mask.any(1)))}
    if method == "grpo":
        nats = lambda: np.where(mask, -rng.uniform(1, 4, mask.shape), np.nan).astype(np.float32)
        gains = np.broadcast_to(rng.normal(size=(ROWS, 1)), mask.shape).astype(np.float32)
        batch |= {"old_logps": nats(), "ref_logps": nats(), "advantages": gains, "fresh": np.arange(ROWS) % 3 == 0}
    return batch


MAKE = {
    "sft": sft.make_loss,
    "dpo": functools.partial(dpo.make_loss, nll=0.3),
    "grpo": functools.partial(grpo.make_loss, kl=0.1),
}
BY = {"gate": "sgd", "wo": "sgd"}
OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(0.1),
    optax.partition(
        {
            # an epsilon well above the rounding of a gradient, which Adam blows up where it is next to nothing
            "adamw": optax.adamw(1e-2, eps=1e-4, weight_decay=0.1),
            "sgd": optax.sgd(0.1, momentum=0.9),
        },
        lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: BY.get(path[-1].key, "adamw"), tree),
    ),
)


@functools.cache
def run(model, method, mesh=None, microbatches=1):
    """State and metrics after two steps, where the state belongs, and the text of the compiled program."""
    loss_fn = MAKE[method](MODELS[model][0])
    state, batch = init_state(params_of(model), OPTIMIZER, jax.random.key(0)), batch_of(method)
    layout = None
    if mesh is not None:
        mesh = sharding.make_mesh(*MESHES[mesh])
        layout = sharding.by_name(state, mesh)
        state, batch = jax.device_put(state, layout), jax.device_put(batch, sharding.rows(mesh))
    step = make_train_step(loss_fn, OPTIMIZER, microbatches=microbatches, shardings=layout)
    program = step.lower(state, None, batch).compile({"xla_backend_optimization_level": 0})  # compiles sooner
    for _ in range(2):
        state, metrics = program(state, None, batch)
    return state, metrics, layout, program.as_text()


CASES = [
    *(("toy", method, mesh, 2) for method in MAKE for mesh in MESHES),
    ("toy", "grpo", "2x2x2", 1),
    *(("decoder", method, "2x2x2", 2) for method in MAKE),
]
EVERY = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))


@EVERY
def test_a_step_on_eight_devices_is_that_of_one(case):
    expected, expected_metrics = run(*case[:2])[:2]
    got, metrics = run(*case)[:2]
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (expected.params, params_of(case[0]))))]
    assert min(moved) > 1e-4
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, jax.device_get(got.params), jax.device_get(expected.params))
    jax.tree.map(close, jax.device_get(metrics), jax.device_get(expected_metrics))


@EVERY
def test_parameters_and_moments_are_still_split_after_a_step(case):
    """An output that nobody pins may come back whole on every device, which a test of values does not show."""
    state, _, layout, _ = run(*case)
    for (path, x), want in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(layout)):
        assert x.sharding.is_equivalent_to(want, x.ndim), path
    _, fsdp, tensor = MESHES[case[2]]
    layers = state.params["layers"]
    tables = [state.params["embed"], *(layers[name] for name in layers.keys() & sharding.LAYOUT.keys())]
    assert len(tables) == {"toy": 4, "decoder": 8}[case[0]]
    shards = lambda x: [s.data.nbytes for s in x.addressable_shards if s.device == jax.devices()[3]]
    assert sum(map(sum, map(shards, tables))) == sum(x.nbytes for x in tables) / (fsdp * tensor)


@pytest.mark.parametrize("method", ["sft", "grpo", "dpo"])
def test_rows_stay_on_the_device_that_has_them(method):
    """Rows dealt to microbatches in blocks are gathered by every device, which then does the work of all; the
    result is the same. Under fsdp the ids do travel, to the devices that have their part of the embedding."""
    program = run("toy", method, "8x1x1", 2)[3]
    assert "all-reduce" in program  # of the gradient
    moved = re.findall(r"= (\S+) (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", program)
    assert moved == []
