"""Adapters against the weights that they stand for, written out in numpy; and what they must leave alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_models
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from small_models import jit

from pt_jax.models import apply, bind, linear, lora, parameters
from pt_jax.models.config import Config, Execution
from pt_jax.recipes import sft
from pt_jax.sampling import Sampling, sample
from pt_jax.training import init_state, make_train_step, sharding

# every product that there is: layers with experts, one without, a shared expert, an unembedding
CONFIG = Config(
    vocab=24, layers=3, width=16, heads=6, kv_heads=2, head_width=4, hidden=12, tied=False, eps=1e-2,
    experts=4, experts_per_token=2, expert_hidden=10, expert_layers=(True, True, False), shared_hidden=6,
)  # fmt: skip
DENSE = dataclasses.replace(CONFIG, experts=0, expert_layers=(), shared_hidden=0, layers=2)
TIED = dataclasses.replace(DENSE, tied=True)

# leaf -> (axes of a stack and of experts, axes of inputs), counted by hand
AXES = {
    "embed": (0, [1]), "unembed": (0, [1]), "wq": (1, [1]), "wk": (1, [1]), "wv": (1, [1]), "wo": (1, [1, 2]),
    "gate": (1, [1]), "up": (1, [1]), "down": (1, [1]), "router": (1, [1]),
    "expert_gate": (2, [2]), "expert_up": (2, [2]), "expert_down": (2, [2]),
    "shared_gate": (1, [1]), "shared_up": (1, [1]), "shared_down": (1, [1]),
}  # fmt: skip
LORA = lora.Adapter(rank=3, alpha=5.0, targets=("*",), overrides=(("w[qo]", 2, 7.0), ("expert_*", 1, 3.0)))
DORA = dataclasses.replace(LORA, targets=("[!e]*", "expert_*"), dora=True)  # all but the embedding
DORA_OF_LAYERS = lora.Adapter(rank=2, alpha=3.0, dora=True)
KINDS = {"lora": LORA, "rslora": dataclasses.replace(LORA, rslora=True), "dora": DORA}
EVERY = pytest.mark.parametrize("how", KINDS.values(), ids=KINDS)

forward = jit(lambda config, *a: apply(config, *a)[0], static_argnums=0)
attached = jit(
    lambda config, params, a, how, *x: apply(config, lora.attach(params, a, how), *x)[0], static_argnums=(0, 3)
)
weights = functools.partial(small_models.weights, scale=0.3)


@functools.cache
def adapters(config, how, seed=1):
    """Trained ones: no B is zero, and no m is a norm."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: lora.init(jax.random.key(0), weights(config), how))
    trained = lambda path, x: rng.normal(size=x.shape) * 0.3 + (path[-1].key == "m") * 1.5
    return jax.tree_util.tree_map_with_path(lambda *x: jnp.asarray(trained(*x), jnp.float32), shapes)


@functools.cache
def batch(seed=2):
    rng = np.random.default_rng(seed)
    seen = np.ones((3, 9), bool)
    seen[1, :4], seen[2, 7:] = False, False
    return rng.integers(0, CONFIG.vocab, seen.shape).astype(np.int32), seen


def matrices(name, w):
    """A weight [stack and experts, inputs, outputs] in float64."""
    w, (groups, inputs) = np.asarray(w, np.float64), AXES[name]
    w = np.moveaxis(w, inputs, range(groups, groups + len(inputs)))
    lead = w.shape[:groups]
    return w.reshape(*lead, int(np.prod([w.shape[groups + i] for i in range(len(inputs))])), -1)


def like(name, matrix, w):
    """The inverse of ``matrices``."""
    groups, inputs = AXES[name]
    moved = np.moveaxis(np.empty(w.shape), inputs, range(groups, groups + len(inputs)))
    return np.moveaxis(matrix.reshape(moved.shape), range(groups, groups + len(inputs)), inputs)


def written_out(name, w, adapter, how):
    """W + s A B, the s, A and B as matrices; of DoRA each output's share m / |W + s A B| as well."""
    rank = 2 if name in ("wq", "wo") else 1 if name.startswith("expert_") else 3
    alpha = {2: 7.0, 1: 3.0, 3: 5.0}[rank]
    scale = alpha / np.sqrt(rank) if how.rslora else alpha / rank
    w = matrices(name, w)
    a = np.asarray(adapter["a"], np.float64).reshape(*w.shape[:-1], rank)
    b = np.asarray(adapter["b"], np.float64).reshape(*w.shape[:-2], rank, w.shape[-1])
    full, share = w + scale * a @ b, 1.0
    if how.dora:
        norm = np.sqrt((full**2).sum(-2))
        share = (np.asarray(adapter["m"], np.float64).reshape(norm.shape) / norm)[..., None, :]
    return full, share, scale, a, b


def adapted_paths(how):
    return {path[:-1] for path in flatten_dict(adapters(CONFIG, how))}


def of(tree, path):
    return functools.reduce(lambda t, k: t[k], path, tree)


def close(got, expected, share=2e-5):
    expected = np.asarray(expected)
    np.testing.assert_allclose(got, expected, rtol=0, atol=share * np.abs(expected).max())


# ---- what an adapter computes


@EVERY
def test_the_adapted_model_is_the_model_of_the_written_out_weights(how):
    params, a = weights(CONFIG), adapters(CONFIG, how)
    flat = flatten_dict(params)
    assert {path[-1] for path in adapted_paths(how)} == set(parameters.PRODUCTS) - ({"embed"} if how.dora else set())
    for path in adapted_paths(how):
        full, share, *_ = written_out(path[-1], flat[path], of(a, path), how)
        flat[path] = jnp.asarray(like(path[-1], full * share, flat[path]), jnp.float32)
    expected = forward(CONFIG, unflatten_dict(flat), *batch())
    assert np.abs(expected - forward(CONFIG, params, *batch())).max() > 1
    close(attached(CONFIG, params, a, how, *batch()), expected, 5e-5)
    folded = lora.fold(params, a, how)
    for path, w in flatten_dict(folded).items():
        close(w, flat[path], 1e-6)
    close(forward(CONFIG, folded, *batch()), expected)


def nll(apply, params, batch):
    tokens, seen = batch
    logps = jnp.take_along_axis(jax.nn.log_softmax(apply(params, tokens, seen)[0][:, :-1]), tokens[:, 1:, None], 2)
    return -jnp.where(seen[:, 1:] & seen[:, :-1], logps[..., 0], 0).sum()


@functools.partial(jit, static_argnums=(0, 3))
def gradients(config, params, adapters, how):
    of_adapters = lambda a: nll(bind(config).apply, lora.attach(params, a, how), batch())
    return jax.grad(of_adapters)(adapters)


gradient_of_weights = jit(
    lambda config, params: jax.grad(lambda p: nll(bind(config).apply, p, batch()))(params), static_argnums=0
)


@EVERY
def test_gradients_follow_from_those_of_the_written_out_weights(how):
    """dA = s G' B^T, dB = s A^T G', with G' = G m / |W + s A B| and dm = G (W + s A B) / |W + s A B|, the norm held."""
    params, adapter = weights(CONFIG), adapters(CONFIG, how)
    got = gradients(CONFIG, params, adapter, how)
    of_weights = gradient_of_weights(CONFIG, lora.fold(params, adapter, how))
    for path in adapted_paths(how):
        full, share, scale, a, b = written_out(path[-1], of(params, path), of(adapter, path), how)
        g, mine = matrices(path[-1], of(of_weights, path)), of(got, path)
        assert np.abs(g).max() > 1e-3, path
        expected = {"a": scale * (g * share) @ b.swapaxes(-1, -2), "b": scale * a.swapaxes(-1, -2) @ (g * share)}
        if how.dora:
            expected["m"] = (g * full / np.sqrt((full**2).sum(-2, keepdims=True))).sum(-2)
        for name, x in expected.items():
            close(mine[name].reshape(x.shape), x, 2e-4)


@pytest.mark.parametrize("how", [LORA, KINDS["rslora"]], ids=["lora", "rslora"])
def test_at_first_the_model_is_the_base_bit_for_bit(how):
    params = weights(CONFIG)
    fresh = lora.init(jax.random.key(0), params, how)
    got = attached(CONFIG, params, fresh, how, *batch())
    np.testing.assert_array_equal(got, forward(CONFIG, params, *batch()))
    for x, y in zip(jax.tree.leaves(lora.fold(params, fresh, how)), jax.tree.leaves(params)):
        np.testing.assert_array_equal(x, y)


def test_at_first_dora_is_the_base_to_rounding():
    params = weights(CONFIG)
    fresh = lora.init(jax.random.key(0), params, DORA)
    close(attached(CONFIG, params, fresh, DORA, *batch()), forward(CONFIG, params, *batch()), 5e-6)


@pytest.mark.parametrize("how", [lora.Adapter(rank=2, targets=("*",)), DORA_OF_LAYERS], ids=["lora", "dora"])
def test_several_adapters_in_one_program_are_each_as_alone(how):
    params = weights(DENSE)
    several = [adapters(DENSE, how, seed) for seed in (1, 5, 6)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *several)
    both = jit(jax.vmap(lambda a: apply(DENSE, lora.attach(params, a, how), *batch())[0]))(stacked)
    for got, a in zip(both, several):
        close(got, attached(DENSE, params, a, how, *batch()), 2e-5)
    assert np.abs(both[0] - both[1]).max() > 0.1


def test_a_tied_embedding_is_adapted_where_it_is_read_and_where_it_predicts():
    how = lora.Adapter(rank=2, alpha=3.0, targets=("embed",))
    params, a = weights(TIED), adapters(TIED, how)
    delta = np.asarray(params["embed"]) + 1.5 * (np.asarray(a["embed"]["a"]) @ np.asarray(a["embed"]["b"])).T
    expected = forward(TIED, params | {"embed": jnp.asarray(delta)}, *batch())
    close(attached(TIED, params, a, how, *batch()), expected)


def test_a_product_is_in_the_type_of_what_comes_in_and_a_folded_weight_in_its_own():
    how = lora.Adapter(rank=2, targets=("*",))
    params, a = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights(DENSE)), adapters(DENSE, how)
    assert attached(DENSE, params, a, how, *batch()).dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(lora.fold(params, a, how))} == {jnp.dtype(jnp.bfloat16)}
    node = jax.tree.map(lambda x: x[0], lora.attach(params, a, how)["layers"]["wo"])
    x = jax.random.normal(jax.random.key(0), (2, 3, 6, 4), jnp.bfloat16)
    got = linear.einsum(parameters.PRODUCTS["wo"], x, node)
    exact = np.tensordot(np.asarray(x, np.float64), np.asarray(node.dense(jnp.float32), np.float64), 2)
    assert got.dtype == jnp.bfloat16
    close(got.astype(jnp.float32), exact, 0.02)


@pytest.mark.parametrize("remat", ["layer", "dots"])
def test_rematerialised_gradients_are_the_same(remat):
    params, a = weights(DENSE), adapters(DENSE, DORA_OF_LAYERS)
    of = lambda how: jit(
        jax.grad(lambda a: nll(bind(DENSE, how).apply, lora.attach(params, a, DORA_OF_LAYERS), batch()))
    )(a)
    for x, y in zip(jax.tree.leaves(of(Execution(remat=remat))), jax.tree.leaves(of(Execution()))):
        close(x, y, 1e-5)


@struct.dataclass
class Coarse(linear.Weight):
    """A weight that is no array: bytes and their unit."""

    codes: jax.Array
    unit: float = struct.field(pytree_node=False)

    def dense(self, dtype):
        return self.codes.astype(dtype) * jnp.asarray(self.unit, dtype)

    def einsum(self, equation, x):
        return linear.einsum(equation, x, self.dense(x.dtype))

    def take(self, rows):
        return self.codes[rows].astype(jnp.float32) * self.unit


@pytest.mark.parametrize("how", [LORA, DORA], ids=["lora", "dora"])
def test_the_base_may_be_any_weight(how):
    """Logits, gradients and folded weights are those over the array that the weight stands for."""
    coarse = lambda path, x: Coarse(jnp.round(x / 0.02).astype(jnp.int8), 0.02) if path[-1] in AXES else x
    params = unflatten_dict({path: coarse(path, x) for path, x in flatten_dict(weights(CONFIG)).items()})
    plain = unflatten_dict({path: linear.dense(x) for path, x in flatten_dict(params).items()})
    a = adapters(CONFIG, how)
    got, expected = gradients(CONFIG, params, a, how), gradients(CONFIG, plain, a, how)
    jax.tree.map(lambda x, y: close(x, y, 1e-5), got, expected)
    folded, expected = lora.fold(params, a, how), lora.fold(plain, a, how)
    for path, x in flatten_dict(folded).items():
        assert isinstance(x, Coarse) == (path not in adapted_paths(how) and path[-1] in AXES)
        close(linear.dense(x), of(expected, path), 1e-6)
    m = lora.init(jax.random.key(0), params, DORA_OF_LAYERS)["layers"]["wo"]["m"]
    close(m, np.sqrt((np.asarray(plain["layers"]["wo"], np.float64) ** 2).sum((1, 2))), 1e-6)


def test_the_sampler_takes_an_adapted_model():
    how, bound = lora.Adapter(rank=2), bind(DENSE)
    params, a = weights(DENSE), adapters(DENSE, how)
    prompts, seen = batch()[0][:, :5], np.ones((3, 5), bool)
    said = [
        sample(tree, prompts, seen, jax.random.key(0), apply=bound.apply, init_cache=bound.init_cache, length=8,
               end_tokens=[-1], pad_token=0, how=Sampling(temperature=0.0)).tokens
        for tree in (lora.attach(params, a, how), lora.fold(params, a, how), params)
    ]  # fmt: skip
    np.testing.assert_array_equal(said[0], said[1])
    assert (said[0] != said[2]).any()


# ---- trees


def test_fresh_a_is_uniform_of_one_over_the_root_of_the_inputs_and_fresh_b_is_zero():
    how = lora.Adapter(rank=64, targets=("*",))
    fresh = jit(lora.init, static_argnums=2)(jax.random.key(3), weights(CONFIG), how)
    inputs = {"wo": 24, "down": 12, "expert_down": 10, "shared_down": 6}
    for path, x in flatten_dict(fresh).items():
        assert x.dtype == jnp.float32
        if path[-1] == "b":
            assert not x.any()
        elif path[-2] == "embed":
            assert abs(float(x.std()) - 1) < 0.1
        else:
            bound = 1 / np.sqrt(inputs.get(path[-2], 16))
            assert 0.97 * bound < np.abs(x).max() <= bound and abs(float(x.std()) - bound / np.sqrt(3)) < 0.05 * bound


def test_a_target_starts_the_same_whatever_the_others_are():
    alone, among = (lora.init(jax.random.key(0), weights(DENSE), lora.Adapter(targets=t)) for t in (("wo",), ("*",)))
    np.testing.assert_array_equal(alone["layers"]["wo"]["a"], among["layers"]["wo"]["a"])
    drawn = [np.asarray(x["a"]).ravel()[:8] for x in among["layers"].values()]
    assert len({x.tobytes() for x in drawn}) == len(drawn)


def test_experts_routers_and_embeddings_are_adapted_only_when_named():
    names = {path[-1] for path in lora.targeted(weights(CONFIG), lora.Adapter())}
    assert names == {"wq", "wk", "wv", "wo"}  # it has experts
    assert {path[-1] for path in lora.targeted(weights(CONFIG), lora.Adapter(targets=("w[qv]", "router")))} == {
        "wq", "wv", "router",
    }  # fmt: skip


def test_attaching_moves_no_data():
    params, a = weights(CONFIG), adapters(CONFIG, LORA)
    tree = lora.attach(params, a, LORA)
    assert tree["layers"]["wq"].w is params["layers"]["wq"] and tree["layers"]["wq"].a is a["layers"]["wq"]["a"]
    assert tree["norm"] is params["norm"]


def without(tree, *path):
    return unflatten_dict({p: x for p, x in flatten_dict(tree).items() if p != path})


def replaced(tree, x, *path):
    return unflatten_dict(flatten_dict(tree) | {path: x})


BAD = {
    "nothing": (lambda p, a: lora.init(jax.random.key(0), p, lora.Adapter(targets=("q_proj",))),
                r"target 'q_proj' matches none of the products of this model: .*wq"),
    "nothing of its own": (lambda p, a: lora.targeted(p, lora.Adapter(overrides=(("expert_*", 2, 2.0),))),
                           r"target 'expert_\*' matches none"),
    "dora embed": (lambda p, a: lora.targeted(p, lora.Adapter(targets=("embed",), dora=True)), "target 'embed': "),
    "rank": (lambda p, a: lora.Adapter(rank=0), "rank must be above 0"),
    "half a rank": (lambda p, a: lora.Adapter(rank=2.5), "rank must be a whole number, got 2.5"),
    "alpha": (lambda p, a: lora.Adapter(overrides=(("wq", 2, -1.0),)), "alpha of 'wq' must be above 0"),
    "a text": (lambda p, a: lora.Adapter(targets="wq"), r"targets is the text 'wq'; give a tuple"),
    "no target": (lambda p, a: lora.Adapter(targets=()), "targets is empty, so nothing would be trained"),
    "missing": (lambda p, a: lora.attach(p, without(a, "layers", "wk", "b"), lora.Adapter(rank=3)),
                r"adapters\['layers/wk/b'\] is missing; .* ask for \(2, 3, 2, 4\)"),
    "rank of another": (lambda p, a: lora.attach(p, a, lora.Adapter(rank=4)),
                        r"adapters\['layers/\w+/a'\] is \(.*3\); .* ask for \(.*4\)"),
    "extra": (lambda p, a: lora.attach(p, replaced(a, jnp.ones(3), "unembed", "a"), lora.Adapter(rank=3)),
              r"adapters\['unembed/a'\] is of nothing"),
    "twice": (lambda p, a: lora.attach(lora.attach(p, a, lora.Adapter(rank=3)), a, lora.Adapter(rank=3)),
              r"params\['layers/\w+'\] has an adapter already"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call(weights(DENSE), adapters(DENSE, lora.Adapter(rank=3)))


# ---- training


@functools.cache
def rows():
    tokens, seen = (np.repeat(x, 8, 0)[:16] for x in batch())
    mask = seen.copy()
    mask[:, 0] = False
    weight = (mask / mask.sum()).astype(np.float32)
    return {"tokens": tokens, "seen": seen, "mask": mask, "weights": weight}


@functools.cache
def steps(how, mesh=None, microbatches=1, optimizer=None):
    """Two steps of SFT: the states' adapters and losses."""
    params, optimizer = weights(DENSE), optimizer or optax.sgd(0.1)
    mesh = mesh and sharding.make_mesh(*mesh)
    state = init_state(lora.init(jax.random.key(0), params, how), optimizer, jax.random.key(0))
    layout = None if mesh is None else sharding.by_name(state, mesh)
    data = rows()
    if mesh is not None:
        state, data = jax.device_put(state, layout), jax.device_put(data, sharding.rows(mesh))
        params = jax.device_put(params, sharding.by_name(params, mesh))
    loss_fn = lora.adapted(sft.make_loss(bind(DENSE).apply), how)
    step, losses = make_train_step(loss_fn, optimizer, microbatches=microbatches, shardings=layout), []
    for _ in range(2):
        state, metrics = step(state, (params, None), data)
        losses.append(float(metrics["loss"]))
    return state, losses


def test_training_moves_the_adapters_and_nothing_else():
    before = jax.tree.map(np.array, weights(DENSE))
    state, losses = steps(DORA_OF_LAYERS)
    assert losses[1] < losses[0]
    fresh = lora.init(jax.random.key(0), weights(DENSE), DORA_OF_LAYERS)
    for path, x in flatten_dict(state.params).items():
        assert (np.asarray(x) != np.asarray(of(fresh, path))).any(), path
    jax.tree.map(np.testing.assert_array_equal, before, weights(DENSE))


def test_the_base_is_an_argument_of_the_program_and_not_a_constant_in_it():
    how = lora.Adapter(rank=2)
    params, a = weights(DENSE), adapters(DENSE, how)
    loss_fn = lora.adapted(sft.make_loss(bind(DENSE).apply), how)
    program = jax.make_jaxpr(lambda a, frozen: loss_fn(a, frozen, rows(), None)[0])(a, (params, None))
    large = [x.shape for x in program.consts if np.size(x) > 3 * rows()["tokens"].size]
    assert not large and len(program.in_avals) == len(jax.tree.leaves((a, params)))


@pytest.mark.parametrize("split", [{"microbatches": 4}, {"mesh": (2, 2, 2), "microbatches": 2}], ids=str)
def test_how_the_work_is_split_changes_no_result(split):
    how = DORA_OF_LAYERS
    plain, losses = steps(how)
    other, losses_too = steps(how, **split)
    np.testing.assert_allclose(losses_too, losses, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(other.params), jax.tree.leaves(plain.params)):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)


def test_an_adapter_lies_on_a_mesh_as_its_weight_does():
    how, mesh = dataclasses.replace(LORA, targets=("wq", "wo", "embed"), overrides=()), sharding.make_mesh(2, 2, 2)
    a = adapters(CONFIG, how)
    state = jax.eval_shape(lambda: init_state(a, optax.adam(0.1), jax.random.key(0)))
    placed = sharding.by_name(state, mesh)
    expected = {
        ("embed", "a"): ("fsdp", None), ("embed", "b"): (None, "tensor"),
        ("layers", "wq", "a"): (None, "fsdp", None), ("layers", "wq", "b"): (None, None, "tensor", None),
        ("layers", "wo", "a"): (None, "tensor", None, None), ("layers", "wo", "b"): (None, None, "fsdp"),
    }  # fmt: skip
    for tree in (placed.params, placed.opt_state[0].mu):
        assert {path: tuple(s.spec) for path, s in flatten_dict(tree).items()} == expected
    nodes = sharding.by_name(lora.attach(weights(CONFIG), a, how), mesh)
    assert tuple(nodes["layers"]["wq"].w.spec) == tuple(sharding.LAYOUT["wq"])
    assert tuple(nodes["layers"]["wo"].b.spec) == expected["layers", "wo", "b"]
    m = sharding.by_name({"wq": {"m": jnp.ones((3, 6, 4))}}, mesh)["wq"]["m"]
    assert tuple(m.spec) == (None, "tensor", None)


def test_lora_plus_gives_b_a_rate_of_its_own():
    how = lora.Adapter(rank=2)
    rates = optax.multi_transform({"a": optax.sgd(0.0), "b": optax.sgd(0.1)}, lora.labels)
    state, _ = steps(how, optimizer=rates)
    fresh = lora.init(jax.random.key(0), weights(DENSE), how)
    for path, x in flatten_dict(state.params).items():
        assert (np.asarray(x) == np.asarray(of(fresh, path))).all() == (path[-1] == "a")
