"""Whole models over weights in few bits: the logits, gradients and texts of the dequantised tree, in less memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from small_models import jit

from pt_jax import models
from pt_jax.models import Config, Execution, bind, decoder, linear, lora, parameters, placing, quantize
from pt_jax.models.quantize import int8, nf4, nf4_double
from pt_jax.sampling import Sampling, sample
from pt_jax.training import init_state, make_train_step, optimizers, schedules, sharding

HOWS = {"int8": int8, "nf4": nf4, "nf4_double": nf4_double}
ALL = pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
# axes of a block and a bit, of less than one, odd ones
DENSE = Config(
    vocab=31, layers=3, width=66, heads=3, kv_heads=1, head_width=10, hidden=65, eps=1e-2, qkv_bias=True, mlp_bias=True
)
MIXED = dataclasses.replace(
    DENSE, mlp_bias=False, tied=False, experts=5, experts_per_token=2, expert_hidden=26,
    expert_layers=(False, True, True), shared_hidden=13, router_bias=True,
)  # fmt: skip
EXPERTS = dataclasses.replace(MIXED, layers=2, expert_layers=(), qkv_bias=False)
forward = jit(lambda config, *a: decoder.apply(config, *a)[0], static_argnums=0)


@functools.cache
def weights(config, seed=0):
    """Far from the initial ones, norms, biases and routers too."""
    rng = np.random.default_rng(seed)

    def fresh(path, x):
        around = 1.0 if path[-1].key.endswith("norm") else 0.0
        return jnp.asarray(around + 0.2 * rng.normal(size=x.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(fresh, jax.eval_shape(lambda: parameters.init(config, jax.random.key(0))))


@functools.cache
def quantized(config, how, targets=None):
    """The tree in few bits, and the same numbers as arrays."""
    small = jit(quantize.quantize, static_argnums=(1, 2))(weights(config), how, targets)
    return small, jit(quantize.dequantize)(small)


def batch(lengths=(9, 4, 1), seed=1):
    rng = np.random.default_rng(seed)
    seen = np.arange(max(lengths)) >= max(lengths) - np.array(lengths)[:, None]
    return rng.integers(0, DENSE.vocab, seen.shape).astype(np.int32), seen


def near(got, expected, share=1e-5):
    expected = np.asarray(expected, np.float64)
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=0, atol=share * abs(expected).max())


def size(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


# ---- what is computed


@pytest.mark.parametrize(
    ("config", "how"),
    [(DENSE, int8), (DENSE, nf4), (DENSE, nf4_double), (MIXED, nf4_double)],
    ids=["int8", "nf4", "nf4_double", "mixed, double"],
)
def test_the_logits_are_those_of_the_dequantised_weights(config, how):
    (small, full), (tokens, seen) = quantized(config, how), batch()
    got, expected = (np.asarray(forward(config, p, tokens, seen))[seen] for p in (small, full))
    near(got, expected)
    original = np.asarray(forward(config, weights(config), tokens, seen))[seen]
    distance = np.sqrt(np.mean((got - original) ** 2) / np.mean(original**2))
    assert 1e-3 < distance < (0.05 if how is int8 else 0.6)  # random weights: no model is as sensitive


@pytest.mark.parametrize("how", [int8, nf4_double], ids=["int8", "nf4_double"])
def test_a_tied_embedding_is_looked_up_and_multiplied_in_few_bits(how):
    small, full = quantized(DENSE, how, ("embed", "down"))
    assert isinstance(small["embed"], linear.Weight) and not isinstance(small["layers"]["wq"], linear.Weight)
    tokens, seen = batch()
    near(*(np.asarray(forward(DENSE, p, tokens, seen))[seen] for p in (small, full)))
    logits, _ = jax.eval_shape(
        functools.partial(decoder.apply, DENSE, how=Execution(dtype="bfloat16")), small, *batch()
    )
    assert logits.dtype == jnp.bfloat16


def loss(config, how, norm, small, tokens, seen):
    """Of a parameter below all layers, so that its gradient goes through every product."""
    logits = decoder.apply(config, small | {"layers": small["layers"] | {"attn_norm": norm}}, tokens, seen, how=how)[0]
    logps = jax.nn.log_softmax(logits[:, :-1])
    logps = jnp.take_along_axis(logps, tokens[:, 1:, None], 2)[..., 0]
    return -jnp.where(seen[:, 1:] & seen[:, :-1], logps, 0).sum()


@pytest.mark.parametrize(
    ("config", "how", "remat"),
    [(DENSE, int8, "none"), (DENSE, nf4, "layer"), (EXPERTS, int8, "dots")],
    ids=["int8", "nf4, layer", "experts, int8, dots"],
)
def test_gradients_go_through_to_what_is_trained(config, how, remat):
    (small, full), (tokens, seen) = quantized(config, how), batch()
    gradient = jit(jax.value_and_grad(functools.partial(loss, config, Execution(remat=remat))))
    norm = small["layers"]["attn_norm"]
    for got, expected in zip(gradient(norm, small, tokens, seen), gradient(norm, full, tokens, seen)):
        near(got, expected, 1e-4)


def test_sampling_draws_the_texts_of_the_dequantised_weights():
    (small, full), bound = quantized(DENSE, nf4_double), bind(DENSE)
    prompts, seen = batch((5, 3))
    one, other = (
        sample(
            p, prompts, seen, jax.random.key(3), apply=bound.apply, init_cache=bound.init_cache, length=12, group=2,
            end_tokens=(2,), pad_token=0, how=Sampling(temperature=0.7),
        )
        for p in (small, full)
    )  # fmt: skip
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.alive, other.alive)
    near(one.logps, other.logps, 1e-4)


# ---- memory


@pytest.mark.parametrize(("how", "bits"), [(int8, 8.13), (nf4, 4.5), (nf4_double, 4.13), (None, 32)])
def test_the_layers_take_few_bits_a_weight(how, bits):
    config = dataclasses.replace(DENSE, width=256, head_width=128, hidden=512)
    params = jax.eval_shape(lambda: parameters.init(config, jax.random.key(0)))
    small = params if how is None else jax.eval_shape(functools.partial(quantize.quantize, how=how), params)
    held = {n: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(w)) for n, w in small["layers"].items()}
    count = {n: x.size for n, x in params["layers"].items()}
    products = [n for n in count if n in quantize.TARGETS]
    assert len(products) == 7
    assert 8 * sum(held[n] for n in products) / sum(count[n] for n in products) == pytest.approx(bits, rel=0.01)


WIDE = Config(vocab=16, layers=2, width=128, heads=2, kv_heads=1, head_width=64, hidden=256)


@pytest.mark.parametrize(("how", "remat"), [(int8, "none"), (nf4, "none"), (nf4_double, "dots")])
def test_no_more_than_a_layer_is_ever_there_in_full(how, remat):
    """What a step needs beside its arguments grows with depth by activations, not by weights."""

    def temporary(layers):
        config = dataclasses.replace(WIDE, layers=layers)
        params = jax.eval_shape(lambda: parameters.init(config, jax.random.key(0)))
        small = jax.eval_shape(functools.partial(quantize.quantize, how=how), params)
        rows = [jax.ShapeDtypeStruct((1, 3), dtype) for dtype in (jnp.int32, bool)]
        gradient = jit(jax.grad(functools.partial(loss, config, Execution(remat=remat))))
        program = gradient.lower(small["layers"]["attn_norm"], small, *rows).compile()
        full = sum(params["layers"][n].size * 4 for n in quantize.TARGETS if n in params["layers"]) / layers
        return program.memory_analysis().temp_size_in_bytes, full

    (two, layer), (ten, _) = temporary(2), temporary(10)
    assert (ten - two) / 8 < layer / 8
    assert two < 3 * layer


# ---- training steps, folders, meshes


def test_training_a_quantised_tree_is_refused_by_name():
    small, _ = quantized(DENSE, int8)
    with pytest.raises(ValueError, match=r"^params.layers.down.values is int8, which no gradient reaches"):
        init_state(small, optimizers.adamw(1e-3), jax.random.key(0))


@functools.cache
def adapters(config, how):
    """Of every product, B far from zero."""
    fresh = jax.eval_shape(lambda key: lora.init(key, weights(config), how), jax.random.key(0))
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32), fresh)


def nll(config, params, batch):
    tokens, seen = batch
    logps = jax.nn.log_softmax(decoder.apply(config, params, tokens, seen)[0][:, :-1])
    logps = jnp.take_along_axis(logps, tokens[:, 1:, None], 2)[..., 0]
    return -jnp.where(seen[:, 1:] & seen[:, :-1], logps, 0).sum() / 10


@pytest.mark.parametrize(
    ("config", "how", "adapter"),
    [(DENSE, int8, lora.Adapter(rank=3)), (DENSE, nf4_double, lora.Adapter(rank=3, dora=True)),
     (EXPERTS, nf4, lora.Adapter(rank=2, targets=("wq", "expert_*", "shared_up")))],
    ids=["int8", "double, dora", "experts, nf4"],
)  # fmt: skip
def test_an_adapter_over_few_bits_has_the_gradients_of_one_over_the_dequantised_weights(config, how, adapter):
    (small, full), of = quantized(config, how), adapters(config, adapter)
    gradient = jit(jax.value_and_grad(lambda a, params: nll(config, lora.attach(params, a, adapter), batch())))
    (got, slopes), (expected, others) = gradient(of, small), gradient(of, full)
    near(got, expected)
    assert len(jax.tree.leaves(slopes)) >= 10
    jax.tree.map(functools.partial(near, share=1e-4), slopes, others)


def test_a_step_trains_adapters_and_leaves_the_base_bit_for_bit():
    """On a mesh, in microbatches, the base placed by the table of layouts."""
    small, adapter, mesh = quantized(DENSE, nf4)[0], lora.Adapter(rank=2), sharding.make_mesh(8)
    loss_fn = lora.adapted(lambda params, frozen, batch, key: (nll(DENSE, params, batch), {}), adapter)
    fresh = jit(lambda key: lora.init(key, weights(DENSE), adapter))(jax.random.key(0))
    state = init_state(fresh, optimizers.adamw(schedules.linear(3e-2, 20)), jax.random.key(0))
    state = jax.device_put(state, layout := sharding.by_name(state, mesh))
    base = jax.device_put(small, sharding.by_name(small, mesh))
    rows = jax.device_put(batch((9, 4, 5, 3, 5, 6, 7, 8) * 2), sharding.rows(mesh))
    step = make_train_step(loss_fn, optimizers.adamw(schedules.linear(3e-2, 20)), microbatches=2, shardings=layout)
    losses = []
    for _ in range(8):
        state, metrics = step(state, (base, None), rows)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, base, small)


QWEN3 = Config(vocab=31, layers=3, width=68, heads=3, kv_heads=1, head_width=10, hidden=64, tied=False)
MIXTRAL = dataclasses.replace(
    QWEN3, family="mixtral", qk_norm=False, hidden=26, experts=4, experts_per_token=2, expert_hidden=26
)


@pytest.mark.parametrize(
    ("how", "config", "mesh"),
    [(int8, QWEN3, None), (nf4_double, QWEN3, (4, 2, 1)), (nf4_double, MIXTRAL, None), (int8, MIXTRAL, (4, 2, 1))],
    ids=["qwen3, int8", "qwen3, double, mesh", "mixtral, double", "mixtral, int8, mesh"],
)
def test_a_folder_is_quantised_as_it_is_read(how, config, mesh, tmp_path, monkeypatch):
    """The same numbers as of the tree afterwards, and no stack of floats is ever there."""
    models.save(tmp_path / "model", weights(config), config)
    place = None if mesh is None else functools.partial(sharding.by_name, mesh=sharding.make_mesh(*mesh))
    before, largest = {id(x) for x in jax.live_arrays()}, []

    def put(filling, part, at=(), put=placing.Filling.put):
        put(filling, part, at)
        floats = [x for x in jax.live_arrays() if x.dtype == np.float32 and x.ndim > 2 and id(x) not in before]
        largest.append(max((x.size for x in floats), default=0))

    monkeypatch.setattr(placing.Filling, "put", put)
    got, read = models.load(tmp_path / "model", place=place, quantize=how)
    assert read.layers == config.layers
    expected = quantized(config, how)[0]
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    stack = max(weights(config)["layers"][name].size for name in quantize.TARGETS if name in weights(config)["layers"])
    assert len(largest) > 20 and max(largest) < stack / 2
    if place is not None:
        jax.tree.map(lambda x, sharding: x.sharding == sharding or pytest.fail(str(x.sharding)), got, place(got))


def test_a_folder_with_a_number_that_is_none_is_refused_by_name(tmp_path):
    params = jax.tree.map(lambda x: x, weights(QWEN3))
    params["layers"]["up"] = params["layers"]["up"].at[2, 5, 7].set(jnp.nan)
    models.save(tmp_path / "model", params, QWEN3)
    with pytest.raises(ValueError, match=r"^up\.2 holds numbers that are not finite"):
        models.load(tmp_path / "model", quantize=nf4)


def test_a_quantised_tree_is_not_saved_as_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"^params\['layers/down'\] is NF4, a folder holds plain weights"):
        models.save(tmp_path / "model", quantized(QWEN3, nf4)[0], QWEN3)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(("how", "mesh"), [(int8, (1, 8, 1)), (nf4_double, (2, 2, 2))], ids=["int8", "nf4_double"])
def test_a_mesh_changes_no_logits_and_splits_what_is_kept(how, mesh):
    config = dataclasses.replace(DENSE, width=512, heads=4, kv_heads=2, head_width=16, hidden=512, layers=2, vocab=32)
    small = quantized(config, how)[0]
    mesh = sharding.make_mesh(*mesh)
    placed = jax.device_put(small, sharding.by_name(small, mesh))
    (tokens, seen), where = batch((9, 4, 1, 3, 5, 6, 7, 8)), sharding.rows(mesh)
    got = forward(config, placed, *jax.device_put((tokens, seen), where))
    near(np.asarray(got)[seen], np.asarray(forward(config, small, tokens, seen))[seen])
    kept = {name: w for name, w in placed["layers"].items() if isinstance(w, linear.Weight)}
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    for device in jax.devices():
        here = sum(s.data.nbytes for x in jax.tree.leaves(kept) for s in x.addressable_shards if s.device == device)
        assert size(kept) / parts <= here <= 1.15 * size(kept) / parts


def test_scales_that_do_not_divide_are_whole_and_numbers_that_do_not_are_refused():
    mesh = sharding.make_mesh(1, 8)
    weight = lambda *shape: {"layers": {"up": jax.ShapeDtypeStruct(shape, jnp.float32)}}
    specs = lambda tree: jax.tree.map(lambda s: s.spec, sharding.by_name(tree, mesh)["layers"]["up"])
    few = jax.eval_shape(functools.partial(quantize.quantize, how=nf4_double), weight(2, 192, 8))
    assert (got := specs(few)).packed == P(None, "fsdp", "tensor")
    assert got.absmax.values == got.absmax.step == P(None, None, "tensor")
    assert (
        specs(jax.eval_shape(functools.partial(quantize.quantize, how=int8), weight(2, 8, 8))).scale == got.absmax.step
    )
    odd = jax.eval_shape(functools.partial(quantize.quantize, how=nf4), weight(2, 24, 8))
    with pytest.raises(ValueError, match=r"^mesh axis fsdp=8 does not divide axis 1 of layers.up.packed, which is 12;"):
        sharding.by_name(odd, mesh)
