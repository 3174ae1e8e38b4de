"""One table of layouts for parameters and moments, and errors that name what does not divide."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pt_jax import models
from pt_jax.training import init_state, optimizers, sharding

CONFIG = models.Config(vocab=32, layers=2, width=16, heads=4, kv_heads=2, head_width=4, hidden=24, tied=False)


@pytest.fixture(scope="module")
def state():
    start = partial(init_state, optimizer=optimizers.adamw(1e-3, 9))
    return jax.eval_shape(lambda key: start(models.init(CONFIG, key), key=key), jax.random.key(0))


@pytest.fixture(scope="module")
def params(state):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), state.params)


def specs(tree):
    return jax.tree.map(lambda s: s.spec, tree)


def test_a_mesh_has_three_axes_that_the_compiler_may_use():
    mesh = sharding.make_mesh(2, 2, 2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert dict(sharding.make_mesh(8).shape) == {"data": 8, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 2, 1), "mesh data=2 x fsdp=2 x tensor=1 asks for 4 devices, there are 8"),
        ((4, 2, 2), "mesh data=4 x fsdp=2 x tensor=2 asks for 16 devices, there are 8"),
        ((0, 1, 1), "mesh data=0 x fsdp=1 x tensor=1 asks for 0 devices, there are 8"),
    ],
)
def test_a_mesh_of_another_number_of_devices_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(*shape)


def test_every_weight_of_the_decoder_has_its_row_in_the_table(state):
    """Only norms are whole on every device; a matrix without a row would quietly fill the memory of each."""
    got = specs(sharding.by_name(state.params, sharding.make_mesh(2, 2, 2)))
    layers = got.pop("layers")
    assert {name for name, spec in (got | layers).items() if spec == P()} == {
        "norm", "attn_norm", "mlp_norm", "q_norm", "k_norm"
    }  # fmt: skip
    for name, spec in (got | layers).items():
        assert spec == P() or {"fsdp", "tensor"} <= {*spec}, name
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
         r"mesh axis fsdp=8 does not divide axis 1 of layers.wq, which is 12$"),
        ((2, 1, 4), {"layers": {"wk": (2, 16, 2, 4)}},
         r"mesh axis tensor=4 does not divide axis 2 of layers.wk, which is 2$"),
        ((1, 1, 8), {"embed": (259, 16)}, r"mesh axis tensor=8 does not divide axis 0 of embed, which is 259$"),
        ((2, 4, 1), {"layers": {"wo": (2, 2, 4, 6)}},
         r"mesh axis fsdp=4 does not divide axis 3 of layers.wo, which is 6$"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_named(mesh, tree, message):
    is_shape = lambda s: isinstance(s, tuple)
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=is_shape)
    with pytest.raises(ValueError, match=message):
        sharding.by_name(shapes, sharding.make_mesh(*mesh))


def test_a_table_of_ones_own():
    tree = {"kernel": jnp.zeros((8, 3)), "embed": jnp.zeros((8, 8))}
    got = specs(sharding.by_name(tree, sharding.make_mesh(1, 8), {"kernel": P("fsdp")}))
    assert got == {"kernel": P("fsdp"), "embed": P()}


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (4, 1, 2)])
def test_rows_are_split_over_data_and_fsdp(mesh):
    mesh = sharding.make_mesh(*mesh)
    x = jax.device_put(np.arange(32).reshape(16, 2), sharding.rows(mesh))
    parts = 16 // mesh.shape["data"] // mesh.shape["fsdp"]
    assert {s.data.shape for s in x.addressable_shards} == {(parts, 2)}
    np.testing.assert_array_equal(x, np.arange(32).reshape(16, 2))
