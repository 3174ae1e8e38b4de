"""Rows whose tokens lie on several devices: the numbers of one device, and an n-th of its memory.

Measured on these cases, as shares of the largest number: logits 5e-7, gradients 2e-6 in float32.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from collectives import moved, numbers

from pt_jax.models import Config, Execution, apply
from pt_jax.training import sharding

QWEN = Config(vocab=29, layers=2, width=24, heads=8, kv_heads=2, head_width=8, hidden=16, eps=1e-2, tied=False)
KINDS = {
    "grouped": QWEN,
    "two windows, two ropes": dataclasses.replace(QWEN, layers=3, windows=(3, 0, 5), local_rope_base=30.0),
    "a soft-cap, a scale a layer": dataclasses.replace(
        QWEN, attention_softcap=2.0, attention_scale=0.6, scale_by_layer=True, windows=(7, 7)
    ),
}
T = 32  # of which two and four devices can deal out their queries, and eight cannot
SEEN = {
    "left": np.arange(T) >= T - np.array((32, 13, 1, 7))[:, None],
    "both": (np.arange(T) >= 4) & (np.arange(T) < 4 + np.array((17, 9, 0, 5))[:, None]),
    "texts": np.int32([[1] * 9 + [2] * 23, [0] * 2 + [3] * 7 + [1] * 11 + [0] * 12, [0] * 32, [5] * 32]),
}
SEEN["branches"] = np.stack(
    [SEEN["texts"], np.where(np.arange(T) < 5, 0, np.arange(T) // 5)[None] % 3 + 0 * SEEN["texts"]], -1
)
TOKENS = np.random.default_rng(2).integers(0, 29, (4, T)).astype(np.int32)
MESHES = {
    "context": {"context": 8},
    "data, context": {"context": 4},
    "fsdp, context, tensor": {"fsdp": 2, "context": 2, "tensor": 2},
}
weights = functools.partial(small_models.weights, scale=0.3)


def loss(config, how, params, tokens, seen):
    """A sum that needs all logits of what is seen."""
    logits = apply(config, params, tokens, seen, how=how)[0].astype(jnp.float32)
    real = (seen if seen.ndim == 2 else seen[..., 0]) != 0
    logits = jnp.where(real[..., None], logits, 0)
    return jnp.sin(logits).sum(), logits


@functools.cache
def program(config, how, mesh, form):
    """Compiled, with its arguments in place."""
    fn = jax.value_and_grad(functools.partial(loss, config, how), has_aux=True)
    args = weights(config), TOKENS, SEEN[form]
    if mesh is not None:
        mesh = sharding.make_mesh(**MESHES[mesh])
        rows = sharding.of_batch({"tokens": args[1], "seen": args[2]}, mesh)
        args = sharding.place(args, (sharding.by_name(args[0], mesh), rows["tokens"], rows["seen"]))
        fn = sharding.within(mesh, fn)
    return jax.jit(fn).lower(*args).compile({"xla_backend_optimization_level": 0}), args


def close(got, expected, share):
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(got), expected, rtol=0, atol=share * np.abs(expected).max())


PLAIN, SPLASH = Execution(attention="plain"), Execution(attention="splash")
CASES = [
    ("grouped", "left", "context", PLAIN),
    ("grouped", "branches", "data, context", PLAIN),
    ("two windows, two ropes", "both", "fsdp, context, tensor", PLAIN),
    ("two windows, two ropes", "texts", "data, context", PLAIN),
    ("a soft-cap, a scale a layer", "left", "fsdp, context, tensor", PLAIN),
    ("grouped", "left", "fsdp, context, tensor", SPLASH),
    pytest.param("two windows, two ropes", "texts", "data, context", SPLASH, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "form", "mesh", "how"), CASES, ids=lambda x: getattr(x, "attention", x))
def test_tokens_on_several_devices_give_the_numbers_of_one(kind, form, mesh, how):
    one, args = program(KINDS[kind], PLAIN, None, form)
    (_, expected), of_one = one(*args)
    several, args = program(KINDS[kind], how, mesh, form)
    (_, got), gradient = several(*args)
    assert np.abs(expected).max() > 1
    close(got, expected, 2e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(of_one)):
        close(a, b, 1e-5)


def test_only_keys_values_and_masks_are_gathered():
    """Ids and masks of tokens are small; hidden states and scores stay where they are, forwards and backwards."""
    compiled, _ = program(QWEN, PLAIN, "context", "left")
    found = moved(compiled)
    keys, mine = f"f32[4,{T},2,8]", f"f32[4,{T // 8},2,8]"
    assert {(name, shape) for name, shape in found if numbers(shape) > T * 4 and name != "all-reduce"} == {
        ("all-gather", keys), ("reduce-scatter", mine)
    }  # fmt: skip
    assert found["all-gather", keys] == found["reduce-scatter", mine] == 2  # once a layer: the layers are a loop
    axes = lambda shape: sorted(int(n) for n in re.findall(r"\d+", shape[3:]) if n != "1")
    of_gradients = [sorted(n for n in x.shape if n > 1) for x in jax.tree.leaves(weights(QWEN))]
    of_gradients += [sorted(x.shape[1:]) for x in weights(QWEN)["layers"].values()]
    assert all(axes(shape) in [*of_gradients, []] for name, shape in found if name == "all-reduce"), found


def test_each_of_n_devices_has_an_nth_of_the_activations():
    """Scores, hidden states and logits: 512 tokens of 4 rows are all of the memory of so small a model.

    Of scores, and of what is computed, less: what no query sees is left out, of which four parts leave 5/8.
    """

    def needs(**axes):
        fn = functools.partial(loss, QWEN, Execution(remat="layer", attention="plain"))
        args = weights(QWEN), jax.ShapeDtypeStruct((4, 512), jnp.int32), jax.ShapeDtypeStruct((4, 512), bool)
        if axes:
            mesh = sharding.make_mesh(**axes)
            fn, rows = sharding.within(mesh, fn), sharding.of_batch({"tokens": args[1]}, mesh)["tokens"]
            layout = sharding.by_name(args[0], mesh), rows, rows
            args = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), args, layout)
        gradient = jax.jit(jax.grad(lambda *x: fn(*x)[0]))
        compiled = gradient.lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes, compiled.cost_analysis()["flops"]

    (whole, products), (part, products_of_part) = needs(), needs(context=8)
    assert whole > 1e8
    assert part < 0.14 * whole and products_of_part < 0.75 * products / 8
