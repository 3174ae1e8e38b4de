"""Experts on several devices: the numbers of one device, whatever the choices are, and each device its own experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import moved, numbers

from pt_jax.models import Config, Execution, forward, init, lora, quantize
from pt_jax.training import sharding

CONFIG = Config(
    vocab=24, layers=2, width=16, heads=4, kv_heads=2, head_width=4, hidden=16, eps=1e-2, experts=8, expert_hidden=12,
    experts_per_token=3, expert_layers=(False, True), shared_hidden=8, norm_experts=True, router_bias=True,
)  # fmt: skip
B, T = 8, 6
RNG = np.random.default_rng(5)
TOKENS = RNG.integers(0, 24, (B, T)).astype(np.int32)
SEEN = np.arange(T) >= np.array([0, 3, 6, 1, 5, 0, 2, 4])[:, None]
ROUTES = np.int32(RNG.permuted(np.tile(np.arange(8), (1, B, T, 1)), axis=-1)[..., :3])
ROUTES[:, :5] = [[[6, 7, 5]]]  # most tokens to the last experts, some devices with nothing to do
MESHES = {
    "data": {"data": 8},
    "expert": {"expert": 8},
    "fsdp, tensor, expert": {"fsdp": 2, "tensor": 2, "expert": 2},
    "context, expert": {"context": 2, "expert": 4},
    "rows that do not divide": {"fsdp": 4, "expert": 2},
}


@functools.cache
def weights(kind):
    rng = np.random.default_rng(0)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: np.float32(path[-1].key.endswith("norm") + 0.4 * rng.normal(size=x.shape)),
        jax.eval_shape(lambda: init(CONFIG, jax.random.key(0))),
    )
    if kind == "arrays":
        return params
    params = quantize.quantize(params, getattr(quantize, kind))
    how = lora.Adapter(rank=2, targets=("expert_*", "router"))
    adapter = jax.tree.map(
        lambda x: np.float32(0.3 * rng.normal(size=x.shape)), lora.init(jax.random.key(1), params, how)
    )
    return lora.attach(params, adapter, how)


def loss(params, tokens, seen, routes, how):
    out = forward(CONFIG, params, tokens, seen, how=how, routes=routes)
    real = jnp.where(seen[..., None], out.hidden, 0), jnp.where(seen[None, ..., None], out.routing.logits, 0)
    return jnp.sin(real[0]).sum() + jnp.cos(real[1]).sum(), (*real, out.routing.choices)


@functools.cache
def computed(mesh, kind="arrays", how=None, rows=B, replayed=True):
    """Value, outputs and gradients, and the compiled program."""
    args = (weights(kind), TOKENS[:rows], SEEN[:rows], ROUTES[:, :rows] if replayed else -1 + 0 * ROUTES[:, :rows])
    fn = jax.value_and_grad(functools.partial(loss, how=how or Execution()), has_aux=True, allow_int=True)
    if mesh is not None:
        mesh = sharding.make_mesh(**MESHES[mesh])
        args = sharding.place(args[0], sharding.by_name(args[0], mesh)), *args[1:]
        fn = sharding.within(mesh, fn)
    program = jax.jit(fn).lower(*args).compile({"xla_backend_optimization_level": 0})
    (_, out), gradient = program(*args)
    return out, gradient, program


CASES = [
    *((mesh, {}) for mesh in MESHES if mesh != "rows that do not divide"),
    ("rows that do not divide", {"rows": 3}),
    ("fsdp, tensor, expert", {"how": Execution(remat="layer"), "replayed": False}),
    ("fsdp, tensor, expert", {"kind": "int8"}),
    pytest.param("context, expert", {"kind": "nf4_double"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("mesh", "more"), CASES, ids=str)
def test_experts_on_several_devices_give_the_numbers_of_one(mesh, more):
    (hidden, logits, choices), of_one, _ = computed(None, **more)
    (got, got_logits, got_choices), gradient, _ = computed(mesh, **more)
    np.testing.assert_array_equal(got_choices, choices)
    close = lambda a, b, share: np.testing.assert_allclose(a, b, rtol=0, atol=share * max(np.abs(b).max(), 1e-3))
    close(got, np.asarray(hidden), 2e-6)
    close(got_logits, np.asarray(logits), 2e-6)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(of_one)):
        if "kind" not in more or getattr(path[-1], "name", None) in ("a", "b"):  # what is quantised is frozen
            close(a, np.asarray(b), 1e-5)


def test_tokens_travel_to_the_experts_and_experts_stay():
    """A device has one expert of eight; no weights of the others come to it, nor more tokens than there are."""
    found = moved(computed("expert")[2])
    one = CONFIG.width * CONFIG.expert_hidden
    hidden = B * T * CONFIG.width
    assert found["all-gather", f"f32[{B * T},{CONFIG.width}]"] and found["reduce-scatter", f"f32[{T},{CONFIG.width}]"]
    for name, shape in found:
        assert numbers(shape) <= hidden, (name, shape)
        assert name == "all-reduce" or f"{CONFIG.width},{CONFIG.expert_hidden}]" not in shape, (name, shape)
    assert hidden < 8 * one


def test_each_device_routes_its_own_rows():
    """The rows of one expert are laid side by side; without a mesh, the compiler lays those of all devices."""
    found = moved(computed("data")[2])
    assert {name for name, shape in found if numbers(shape) > 1} == {"all-reduce"}  # of gradients
