"""One table of layouts for parameters and moments, and errors that name what does not divide."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pt_jax import models
from pt_jax.tracking import tables
from pt_jax.training import init_state, optimizers, sharding

CONFIG = models.Config(vocab=32, layers=2, width=16, heads=4, kv_heads=2, head_width=4, hidden=24, tied=False)


@pytest.fixture(scope="module")
def state():
    start = partial(init_state, optimizer=optimizers.adamw(1e-3))
    return jax.eval_shape(lambda key: start(models.init(CONFIG, key), key=key), jax.random.key(0))


@pytest.fixture(scope="module")
def params(state):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), state.params)


def specs(tree):
    return jax.tree.map(lambda s: s.spec, tree)


def test_a_mesh_has_five_axes_that_the_compiler_may_use():
    mesh = sharding.make_mesh(2, 2, 2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    assert mesh.axis_types == (AxisType.Auto,) * 5
    assert dict(sharding.make_mesh(context=2, expert=4).shape) == {
        "data": 1, "fsdp": 1, "expert": 4, "context": 2, "tensor": 1
    }  # fmt: skip


def test_data_takes_the_devices_that_the_others_leave():
    assert sharding.make_mesh().shape["data"] == 8
    assert sharding.make_mesh(fsdp=2, context=2).shape["data"] == 2


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"data": 2, "fsdp": 2}, "^mesh data=2 x fsdp=2 asks for 4 devices, there are 8$"),
        ({"data": 4, "fsdp": 2, "tensor": 2}, "^mesh data=4 x fsdp=2 x tensor=2 asks for 16 devices, there are 8$"),
        ({"data": 1}, "^mesh of one device asks for 1 devices, there are 8$"),
        ({"data": 0}, "^mesh axis data must have at least 1 device, got 0$"),
        ({"context": -2}, "^mesh axis context must have at least 1 device, got -2$"),
        ({"expert": 3, "context": 2}, "^mesh expert=3 x context=2 asks for multiples of 6 devices, there are 8$"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(**shape)


MIXTURE = dataclasses.replace(
    CONFIG, experts=4, expert_hidden=8, shared_hidden=8, expert_layers=(False, True), router_bias=True,
    qkv_bias=True, mlp_bias=True, out_bias=True, learned_positions=True, max_length=16,
)  # fmt: skip


@pytest.mark.parametrize("config", [CONFIG, MIXTURE], ids=["dense", "experts"])
def test_every_weight_of_the_decoder_has_its_row_in_the_table(config):
    """Only norms and what is as small are whole; a matrix without a row would quietly fill the memory of each."""
    shapes = jax.eval_shape(partial(models.init, config), jax.random.key(0))
    got = specs(sharding.by_name(shapes, sharding.make_mesh(1, 2, 2, expert=2)))
    layers = got.pop("layers")
    whole = {name for name, spec in (got | layers).items() if spec == P()}
    norms = {"norm", "attn_norm", "mlp_norm", "q_norm", "k_norm"}
    assert whole == (norms if config is CONFIG else norms | {"router_bias", "wo_bias", "down_bias", "shared_down_bias"})
    for name, spec in (got | layers).items():
        if name not in whole and not name.endswith("bias"):
            axes = {"fsdp"} if name in ("positions", "router") else {"fsdp", "tensor"}
            assert {*spec} - {None} == axes | ({"expert"} if name.startswith("expert_") else set()), name
    assert all(spec == P() or spec[0] is None for spec in layers.values())  # the stack of layers is not split


def test_the_moments_lie_as_their_parameters_do_and_the_rest_is_everywhere(state):
    got = specs(sharding.by_name(state, sharding.make_mesh(1, 4, 2)))
    moments = [x for x in jax.tree.leaves(got.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu")]
    assert len(moments) == 1
    assert moments[0].mu == moments[0].nu == got.params
    assert got.step == got.key == moments[0].count == P()


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1, momentum=0.9), optax.lion(1e-3), optax.adafactor(1e-3)])
def test_the_state_of_any_optimiser_can_be_placed(optimizer, params):
    """Adafactor's moments have the names of their parameters and other shapes; they are whole where a row does not
    fit."""
    state = init_state(params, optimizer, jax.random.key(0))
    mesh = sharding.make_mesh(2, 2, 2)
    jax.block_until_ready(jax.device_put(state, sharding.by_name(state, mesh)))


def bytes_on(device, tree):
    return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == device)


def test_each_of_eight_devices_holds_an_eighth_of_the_weights(params):
    params = jax.device_put(params, sharding.by_name(params, sharding.make_mesh(1, 8)))
    split = {name: x for name, x in (params | params["layers"]).items() if name in sharding.LAYOUT}
    assert len(split) == 9
    whole = sum(x.nbytes for x in split.values())
    assert whole > 8000
    for device in jax.devices():
        assert bytes_on(device, split) == whole / 8
    assert not any(x.is_fully_replicated for x in split.values())


def test_data_parallel_devices_hold_every_weight(params):
    params = jax.device_put(params, sharding.by_name(params, sharding.make_mesh(8)))
    assert all(x.is_fully_replicated for x in jax.tree.leaves(params))


def test_a_value_survives_being_placed(params):
    placed = jax.device_put(params, sharding.by_name(params, sharding.make_mesh(2, 2, 2)))
    jax.tree.map(np.testing.assert_array_equal, placed, params)


@pytest.mark.parametrize(
    ("mesh", "tree", "message"),
    [
        ((1, 8, 1), {"layers": {"wq": (2, 12, 8, 4)}},
         r"mesh axis fsdp=8 does not divide axis 1 of layers.wq, which is 12; choose fsdp of 4 or "
         "another divisor of 12$"),
        ((2, 1, 4), {"layers": {"wk": (2, 16, 2, 4)}},
         r"mesh axis tensor=4 does not divide axis 2 of layers.wk, which is 2; choose tensor of 2 or "
         "another divisor of 2$"),
        ((1, 8, 1), {"embed": (259, 12)}, r"mesh axis fsdp=8 does not divide axis 1 of embed, which is 12"),
        ((2, 4, 1), {"layers": {"wo": (2, 2, 4, 6)}},
         r"mesh axis fsdp=4 does not divide axis 3 of layers.wo, which is 6; choose fsdp of 2 or "
         "another divisor of 6$"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_named(mesh, tree, message):
    is_shape = lambda s: isinstance(s, tuple)
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=is_shape)
    with pytest.raises(ValueError, match=message):
        sharding.by_name(shapes, sharding.make_mesh(*mesh))


def test_experts_that_do_not_divide_are_named():
    tree = {"layers": {"expert_up": jax.ShapeDtypeStruct((2, 6, 16, 8), jnp.float32)}}
    with pytest.raises(ValueError, match=r"^mesh axis expert=4 does not divide axis 1 of layers.expert_up, which is 6"):
        sharding.by_name(tree, sharding.make_mesh(expert=4))


def test_a_vocabulary_that_does_not_divide_is_whole_and_the_table_says_so():
    tree = {"embed": jax.ShapeDtypeStruct((259, 16), jnp.float32)}
    mesh = sharding.make_mesh(1, 4, 2)
    assert sharding.by_name(tree, mesh)["embed"].spec == P(None, "fsdp")
    assert "259 do not divide over tensor" in tables.text(sharding.table(tree, mesh), 100)


def test_a_table_of_ones_own():
    tree = {"kernel": jnp.zeros((8, 3)), "embed": jnp.zeros((8, 8))}
    got = specs(sharding.by_name(tree, sharding.make_mesh(1, 8), {"kernel": P("fsdp")}))
    assert got == {"kernel": P("fsdp"), "embed": P()}


def test_the_table_adds_up_to_what_the_devices_hold(params):
    state = init_state(params, optax.adam(1e-3), jax.random.key(0))
    mesh = sharding.make_mesh(2, 2, 2)
    placed = jax.device_put(state, sharding.by_name(state, mesh))
    said = tables.text(sharding.table(state, sharding.planned_mesh(2, 2, 2)), 100)
    lines = {line.split()[0]: line.split()[-2:] for line in said.split("\n") if line.strip()}
    numbers = lambda name: [int(x.replace(",", "")) for x in lines[name]]
    whole = sum(x.nbytes for x in jax.tree.leaves(state))
    assert numbers("together") == [whole, bytes_on(jax.devices()[5], placed)]
    assert numbers("opt_state") == [
        sum(x.nbytes for x in jax.tree.leaves(state.opt_state)), bytes_on(jax.devices()[5], placed.opt_state)
    ]  # fmt: skip
    assert numbers("layers.wk") == [2 * 16 * 2 * 4 * 4, 2 * 16 * 2 * 4]
    assert "mesh data=2 x fsdp=2 x tensor=2, 8 devices" in said


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (4, 1, 2)])
def test_rows_are_split_over_data_and_fsdp(mesh):
    mesh = sharding.make_mesh(*mesh)
    x = jax.device_put(np.arange(32).reshape(16, 2), sharding.rows(mesh))
    parts = 16 // mesh.shape["data"] // mesh.shape["fsdp"]
    assert {s.data.shape for s in x.addressable_shards} == {(parts, 2)}
    np.testing.assert_array_equal(x, np.arange(32).reshape(16, 2))


def batch(rows=16, tokens=12):
    leaf = lambda *shape: np.arange(np.prod(shape)).reshape(shape)
    side = {"tokens": leaf(rows, tokens), "seen": leaf(rows, tokens, 2), "mask": leaf(rows, tokens)}
    return {"chosen": side, "ref_chosen": leaf(rows), "router_weights": leaf(rows, 2, tokens)}


def test_rows_and_tokens_of_a_batch_are_split():
    mesh = sharding.make_mesh(1, 2, context=2, expert=2)
    got = specs(sharding.of_batch(batch(), mesh))
    rows = ("data", "fsdp", "expert")
    assert got["chosen"] == {"tokens": P(rows, "context"), "seen": P(rows, "context"), "mask": P(rows, "context")}
    assert got["ref_chosen"] == P(rows) and got["router_weights"] == P(rows, None, "context")
    placed = sharding.place(batch(), sharding.of_batch(batch(), mesh))
    assert {s.data.shape for s in placed["chosen"]["seen"].addressable_shards} == {(4, 6, 2)}
    jax.tree.map(np.testing.assert_array_equal, placed, batch())


@pytest.mark.parametrize(
    ("sizes", "shape", "message"),
    [
        ((12, 12), {"fsdp": 4, "expert": 2},
         "^batch.chosen.mask has 12 rows, which fsdp=4 x expert=2 does not divide; choose a multiple of 8$"),
        ((16, 10), {"context": 4},
         "^batch.chosen.mask has 10 tokens a row, which context=4 does not divide; choose a multiple of 4$"),
    ],
)  # fmt: skip
def test_a_batch_that_does_not_divide_is_refused(sizes, shape, message):
    with pytest.raises(ValueError, match=message):
        sharding.of_batch(batch(*sizes), sharding.make_mesh(**shape))


def test_the_same_function_is_told_of_a_mesh_once():
    mesh, fn = sharding.make_mesh(4, 2), lambda: jax.sharding.get_abstract_mesh()
    assert sharding.within(mesh, fn) is sharding.within(sharding.make_mesh(4, 2), fn)
    assert sharding.within(mesh, fn)() == mesh.abstract_mesh and fn().empty
