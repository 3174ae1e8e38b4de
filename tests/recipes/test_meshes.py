"""However many devices work on it and however the weights are split, a step is the same step."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from collectives import moved, numbers

from pt_jax import models, weights
from pt_jax.recipes import dpo, grpo, sft
from pt_jax.training import init_state, make_train_step, sharding

MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"data": 4, "tensor": 2},
    "context": {"data": 2, "context": 4},
    "data, fsdp, tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp, tensor, context": {"fsdp": 2, "tensor": 2, "context": 2},
    "fsdp, expert": {"fsdp": 2, "expert": 4},
    "tensor, context, expert": {"tensor": 2, "context": 2, "expert": 2},
}
ROWS, COLUMNS, VOCAB = 16, 8, 40
LENGTHS = np.array([5, 3, 0, 4, 1, 2, 7, 2, 1, 1, 5, 4, 0, 3, 2, 5])  # scored tokens; no two shards are alike


def toy(params, tokens, seen):
    """A decoder without attention, with names of the table: a step of it compiles in a third of the time."""
    x = params["embed"][tokens] * seen[..., None]
    x = jnp.cumsum(x, 1) / jnp.maximum(jnp.cumsum(seen, 1), 1)[..., None]
    w = jax.tree.map(lambda w: w[0], params["layers"])
    h = jax.nn.silu(jnp.einsum("btd,df->btf", x, w["gate"])) * jnp.einsum("btd,df->btf", x, w["up"])
    x = x + jnp.einsum("btf,fd->btd", h, w["down"])
    x = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-3) * params["norm"][None, None]
    return jnp.einsum("btd,vd->btv", x, params["embed"]), None


# Each tensor device has one of the key heads, and the two query heads that it serves. No axis of a parameter, nor a
# part of one, is as long as one of tokens: what travels between devices can be told by its shape.
SIZES = {"layers": 2, "width": 24, "heads": 4, "kv_heads": 2, "head_width": 6, "hidden": 48}
CONFIG = models.Config(vocab=VOCAB, **SIZES, qk_norm=False)
MIXTURE = dataclasses.replace(
    CONFIG, experts=4, expert_hidden=20, experts_per_token=2, expert_layers=(False, True), shared_hidden=10
)
LAYER = {"gate": (1, 24, 48), "up": (1, 24, 48), "down": (1, 48, 24)}
TOY = {"embed": (VOCAB, 24), "norm": (24,), "layers": LAYER}
MODELS = {
    "toy": (toy, TOY),
    "decoder": (models.bind(CONFIG).apply, models.parameters.shapes(CONFIG)),
    "experts": (models.bind(MIXTURE).apply, models.parameters.shapes(MIXTURE)),
}


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
    """State and metrics after two steps, where the state belongs, and the compiled program."""
    loss_fn = MAKE[method](MODELS[model][0])
    state, batch = init_state(params_of(model), OPTIMIZER, jax.random.key(0)), batch_of(method)
    layout = None
    if mesh is not None:
        mesh = sharding.make_mesh(**MESHES[mesh])
        loss_fn, layout = sharding.within(mesh, loss_fn), sharding.by_name(state, mesh)
        state, batch = sharding.place(state, layout), sharding.place(batch, sharding.of_batch(batch, mesh))
    step = make_train_step(loss_fn, OPTIMIZER, microbatches=microbatches, shardings=layout)
    program = step.lower(state, None, batch).compile({"xla_backend_optimization_level": 0})  # compiles sooner
    for _ in range(2):
        state, metrics = program(state, None, batch)
    return state, metrics, layout, program


ALONE = ("data", "fsdp", "tensor", "context")
CASES = [
    *(("decoder", "sft", mesh, 2) for mesh in (*ALONE, "fsdp, tensor, context")),
    ("decoder", "dpo", "fsdp, tensor, context", 2),
    *(pytest.param(("decoder", "dpo", mesh, 2), marks=pytest.mark.slow) for mesh in ALONE),
    ("decoder", "grpo", "data, fsdp, tensor", 2),
    ("experts", "sft", "fsdp, expert", 2),
    pytest.param(("experts", "dpo", "tensor, context, expert", 1), marks=pytest.mark.slow),
    *(("toy", method, "data", 2) for method in MAKE),
    ("toy", "grpo", "fsdp", 2),
    ("toy", "grpo", "data, fsdp, tensor", 1),
]
EVERY = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))


@EVERY
def test_a_step_on_eight_devices_is_that_of_one(case):
    expected, expected_metrics = run(*case[:2])[:2]
    got, metrics = run(*case)[:2]
    changed = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (expected.params, params_of(case[0]))))]
    assert min(changed) > 1e-4
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, numbers_of(got), numbers_of(expected))
    jax.tree.map(close, jax.device_get(metrics), jax.device_get(expected_metrics))


def numbers_of(state):
    return jax.device_get((state.params, state.opt_state))


@EVERY
def test_parameters_and_moments_are_still_split_after_a_step(case):
    """An output that nobody pins may come back whole on every device, which a test of values does not show."""
    state, _, layout, _ = run(*case)
    for (path, x), want in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(layout)):
        assert x.sharding.is_equivalent_to(want, x.ndim), path
        assert x.sharding.shard_shape(x.shape) == want.shard_shape(x.shape)


def test_with_fsdp_each_of_eight_devices_has_an_eighth_of_parameters_and_moments():
    """Of the compiled step: what it is given and gives back, and what it needs in between."""
    state, _, layout, program = run("decoder", "sft", "fsdp", 2)
    split = [x.nbytes for x, place in zip(*map(jax.tree.leaves, (state, layout))) if not place.is_fully_replicated]
    whole = [x.nbytes for x, place in zip(*map(jax.tree.leaves, (state, layout))) if place.is_fully_replicated]
    assert sum(whole) < 0.02 * sum(split)  # norms and counts
    batch = sum(x.nbytes for x in jax.tree.leaves(batch_of("sft"))) / 8
    memory = program.memory_analysis()
    assert memory.argument_size_in_bytes == pytest.approx(sum(split) / 8 + sum(whole) + batch, rel=0.02)
    assert memory.alias_size_in_bytes == pytest.approx(sum(split) / 8 + sum(whole), rel=0.02)  # updated in place


def axes_of(shape):
    return {int(n) for n in re.findall(r"\d+", shape[shape.index("[") :])}


def test_what_travels_is_what_the_mesh_asks_for():
    """Under data, gradients; under fsdp, weights and gradients; under tensor, sums of hidden states; under context,
    keys and values. Rows and tokens of hidden states and logits stay where they are, forwards and backwards.
    """
    found = {mesh: moved(run("decoder", "sft", mesh, 2)[3]) for mesh in ALONE}
    tokens = {COLUMNS, COLUMNS - 1, *(rows * t for rows in (8, 16) for t in (COLUMNS, COLUMNS - 1))}
    kinds = {mesh: {name for name, shape in each if numbers(shape) > ROWS * COLUMNS} for mesh, each in found.items()}
    assert kinds["data"] == {"all-reduce"}
    assert {"all-gather"} < kinds["fsdp"] <= {"all-gather", "all-reduce", "reduce-scatter"}
    for mesh in ("data", "fsdp"):
        assert not [shape for _, shape in found[mesh] if axes_of(shape) & tokens and numbers(shape) > 1], mesh
    layers = {name: x.shape[1:] for name, x in params_of("decoder")["layers"].items() if name in sharding.LAYOUT}
    sizes = sorted(math.prod(shape) for shape in layers.values())
    gathered = [numbers(shape) for name, shape in found["fsdp"].elements() if name == "all-gather"]
    assert set(sizes) | {VOCAB * 24} == set(gathered)  # each matrix of a layer, and the embedding
    # each once forwards and once backwards, and the embedding once for both of its uses, or for each
    assert len(sizes) * 2 <= len(gathered) <= len(sizes) * 2 + 3
    assert kinds["tensor"] == {"all-reduce"}
    mine = 8 // 4 * COLUMNS * 24  # hidden states of a device's rows of a microbatch
    assert mine in [numbers(shape) for name, shape in found["tensor"]]
    keys, of_mine = (f"f32[4,{t},2,6]" for t in (COLUMNS, COLUMNS // 4))
    assert {(name, shape) for name, shape in found["context"] if axes_of(shape) & tokens and shape[0] == "f"} == {
        ("all-gather", keys)
    }  # fmt: skip
    assert found["context"]["all-gather", keys] == found["context"]["reduce-scatter", of_mine] == 2


@pytest.mark.parametrize("method", ["sft", "grpo", "dpo"])
def test_rows_stay_on_the_device_that_has_them(method):
    """Rows dealt to microbatches in blocks are gathered by every device, which then does the work of all; the
    result is the same."""
    found = moved(run("toy", method, "data", 2)[3])
    assert {name for name, _ in found} == {"all-reduce"}  # of the gradient
