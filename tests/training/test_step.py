"""One step for every loss: parts of a batch add up to it, filling changes nothing, and a rerun is the same run.

The model is a small flax.linen one: its ``apply`` and its parameter tree serve as they are.
"""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_steps import SGD, linear, linear_batch, linear_state, linear_step

from pt_jax import weights
from pt_jax.recipes import dpo, grpo, sft
from pt_jax.training import init_state, make_train_step, optimizers

VOCAB, ROWS, COLUMNS = 11, 8, 7
LENGTHS = np.array([6, 3, 0, 5, 1, 4, 6, 2])  # scored tokens; no two halves are alike


class Toy(nn.Module):
    """Logits from the mean of the embeddings so far: cheap, and it cares about padding."""

    @nn.compact
    def __call__(self, tokens, seen):
        x = nn.Embed(VOCAB, 6)(tokens) * seen[..., None]
        x = jnp.cumsum(x, 1) / jnp.maximum(jnp.cumsum(seen, 1), 1)[..., None]
        return nn.Dense(VOCAB)(nn.tanh(nn.Dense(8)(x)) * 3)


def apply(params, tokens, seen):
    return Toy().apply({"params": params}, tokens, seen), None


@pytest.fixture(scope="module")
def params():
    ones = jnp.ones((1, 2), bool)
    return jax.jit(Toy().init)(jax.random.key(0), ones.astype(int), ones)["params"]


LOSSES = {
    "sft": sft.make_loss(apply),
    "dpo": dpo.make_loss(apply, beta=0.5, nll=0.3),
    "grpo": grpo.make_loss(apply, kl=0.1, clip_low=0.1),
}
RULES = {
    "token_mean": weights.token_mean,
    "sequence_mean": weights.sequence_mean,
    "constant_length": functools.partial(weights.constant_length, length=9),
}
CASES = [("dpo", "row_mean"), *((method, rule) for method in ("sft", "grpo") for rule in RULES)]


def texts(lengths, seed=0, rule=weights.token_mean):
    rng = np.random.default_rng(seed)
    columns = np.arange(COLUMNS)
    seen = columns <= lengths[:, None]
    tokens = rng.integers(0, VOCAB, (len(lengths), COLUMNS)).astype(np.int32)
    mask = seen & (columns > 0)
    return {"tokens": np.where(seen, tokens, 0), "seen": seen, "mask": mask, "weights": np.asarray(rule(mask))}


def make_batch(method, rule):
    rng = np.random.default_rng(1)
    if method == "dpo":
        real = LENGTHS > 0
        nats = lambda: np.where(real, -rng.uniform(3, 15, ROWS), np.nan).astype(np.float32)
        batch = {"chosen": texts(LENGTHS, 1), "rejected": texts(LENGTHS[::-1] * real, 2)}
        batch |= {"ref_chosen": nats(), "ref_rejected": nats()}
        return batch | {"weights": np.asarray(weights.row_mean(real))}
    batch = texts(LENGTHS, rule=RULES[rule])
    if method == "grpo":
        nats = lambda: np.where(batch["mask"], -rng.uniform(1, 4, batch["mask"].shape), np.nan).astype(np.float32)
        gains = np.where(batch["mask"], rng.normal(size=(ROWS, 1)), 1e9).astype(np.float32)
        batch |= {"old_logps": nats(), "ref_logps": nats(), "advantages": gains}
        batch["fresh"] = np.arange(ROWS) % 3 == 0
    return batch


@functools.cache
def slopes_of(method):
    return jax.jit(jax.value_and_grad(LOSSES[method], has_aux=True))


@functools.cache
def step_of(method, microbatches):
    return make_train_step(LOSSES[method], SGD, microbatches=microbatches)


def run(method, params, batch, microbatches, steps=1):
    state = init_state(params, SGD, jax.random.key(3))
    for _ in range(steps):
        state, metrics = step_of(method, microbatches)(state, None, batch)
    return jax.device_get(state), jax.device_get(metrics)


def assert_close(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, expected)


@pytest.mark.parametrize(("method", "rule"), CASES)
def test_a_step_is_the_gradient_of_the_whole_batch(params, method, rule):
    batch = make_batch(method, rule)
    (loss, _), slopes = slopes_of(method)(params, None, batch, jax.random.key(9))
    state, metrics = run(method, params, batch, 1)
    assert optax.tree.norm(slopes) > 1e-3
    assert_close(state.params, jax.tree.map(lambda p, g: p - 0.3 * g, params, slopes))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(slopes), rtol=1e-5)


@pytest.mark.parametrize("microbatches", [2, 4])
@pytest.mark.parametrize(("method", "rule"), CASES)
def test_microbatches_change_nothing(params, method, rule, microbatches):
    batch = make_batch(method, rule)
    whole, parts = (run(method, params, batch, m) for m in (1, microbatches))
    assert_close(parts[0].params, whole[0].params)
    assert_close(parts[1], whole[1])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(whole[0].params))


def filled(batch):
    """A column in front, two behind and as many empty rows again, all full of rubbish."""

    def fill(path, x):
        name = path[-1].key
        rubbish = {"weights": 0, "mask": False, "seen": False, "fresh": True, "tokens": 7}.get(name, np.nan)
        widths = ((0, ROWS), (1, 2))[: x.ndim]
        return np.pad(x, widths, constant_values=rubbish)

    return jax.tree_util.tree_map_with_path(fill, batch)


@pytest.mark.parametrize("method", LOSSES)
def test_padding_columns_and_empty_rows_change_nothing(params, method):
    batch = make_batch(method, {"dpo": "row_mean"}.get(method, "sequence_mean"))
    state, metrics = run(method, params, batch, 2)
    more_state, more_metrics = run(method, params, filled(batch), 2)
    assert_close(more_state.params, state.params)
    if method == "grpo":
        rows = more_metrics.pop("logps")
        np.testing.assert_allclose(rows[:ROWS, 1:-2], metrics.pop("logps"), rtol=1e-5, atol=1e-6)
        assert (rows[ROWS:] == 0).all()
    assert_close(more_metrics, metrics)


def test_a_batch_given_twice_over_is_the_same_batch(params):
    """A stray division by the number of rows would show."""
    once = make_batch("sft", "token_mean")
    twice = jax.tree.map(lambda x: np.concatenate([x[:ROWS], x[:ROWS]]), filled(once))  # a shape that is compiled
    for rule in RULES.values():
        (a, _), (b, _) = (run("sft", params, x | {"weights": np.asarray(rule(x["mask"]))}, 2) for x in (once, twice))
        assert_close(b.params, a.params)


@pytest.mark.parametrize("microbatches", [1, 2, 4, 8])
def test_metrics_of_rows_come_back_in_the_order_of_the_batch_and_scalars_add(microbatches):
    batch = linear_batch()
    _, metrics = linear_step(microbatches)(linear_state(), np.float32(0), batch)
    np.testing.assert_array_equal(metrics["row"], batch["x"][:, 0])
    np.testing.assert_array_equal(metrics["rows"], batch["x"])
    np.testing.assert_allclose(metrics["sum"], batch["x"].sum(), rtol=1e-5)
    assert metrics["count"] == 8
    assert metrics["loss"].shape == metrics["grad_norm"].shape == ()


def test_what_comes_in_bfloat16_is_trained_in_float32():
    """In bfloat16 an update of a thousandth of 1 is lost, and so would the sum of a thousand of them be."""
    optimizer, coarse = optax.sgd(1e-3), {"w": jnp.ones(3, jnp.bfloat16)}
    state = init_state(coarse, optimizer, jax.random.key(0), reference=coarse)
    assert (state.params["w"].dtype, state.reference["w"].dtype) == (jnp.float32, jnp.bfloat16)
    step = make_train_step(lambda params, *_: (params["w"].astype(jnp.bfloat16).sum(), {}), optimizer)
    for _ in range(4):
        state, _ = step(state, None, {})
    np.testing.assert_allclose(state.params["w"], 0.996, rtol=1e-6)


def test_parameters_narrower_than_float32_are_refused_by_the_step():
    state = linear_state().replace(params={"w": jnp.ones(3, jnp.bfloat16)})
    with pytest.raises(ValueError, match=r"state.params.w is bfloat16; init_state keeps what is trained in float32"):
        linear_step(1)(state, np.float32(0), linear_batch())


def test_gradients_of_a_loss_in_bfloat16_add_up_in_float32():
    """256 + 1 is 256 in bfloat16."""

    def loss(params, frozen, batch, key):
        return (params["w"].astype(jnp.bfloat16) * batch["x"].astype(jnp.bfloat16)).sum().astype(jnp.float32), {}

    step = make_train_step(loss, optax.sgd(1.0), microbatches=4)
    state, _ = step(
        init_state({"w": jnp.zeros(1)}, optax.sgd(1.0), jax.random.key(0)), None, {"x": np.float32([256, 1, 1, 1])}
    )
    np.testing.assert_array_equal(state.params["w"], [-259])


@pytest.mark.parametrize("microbatches", [2, 8])
def test_the_clip_is_by_the_norm_of_the_whole_batch(microbatches):
    """Microbatches whose gradients cancel have norms far above the clip; together they are below it."""
    batch = linear_batch()
    batch["x"][::2] *= -100
    batch["x"][1::2] = -batch["x"][::2] + 0.01
    clipped = make_train_step(linear, optax.chain(optax.clip_by_global_norm(1.0), SGD), microbatches=microbatches)
    state, metrics = clipped(linear_state(optax.chain(optax.clip_by_global_norm(1.0), SGD)), np.float32(0), batch)
    expected = batch["x"].astype(np.float64).sum(0) / 8
    assert np.linalg.norm(expected) < 1 < np.linalg.norm(batch["x"], axis=1).min() / 8
    np.testing.assert_allclose(state.params["w"], 1 - 0.3 * expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(expected), rtol=1e-3)


def test_what_is_frozen_is_an_argument():
    step = make_train_step(linear, SGD)
    losses = [step(linear_state(), np.float32(frozen), linear_batch())[1]["loss"] for frozen in (0, 5)]
    np.testing.assert_allclose(losses[0] - losses[1], 5, rtol=1e-5)
    assert step._cache_size() == 1


def test_the_state_is_consumed_and_what_it_was_made_of_is_not(params):
    key, batch = jax.random.key(3), make_batch("sft", "token_mean")
    state, before = init_state(params, SGD, key), jax.tree.map(np.array, params)
    new, _ = step_of("sft", 1)(state, None, batch)
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.key, state.step)))
    assert int(new.step) == 1
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, params), before)
    assert jax.random.bits(key).shape == ()


@pytest.mark.parametrize("microbatches", [1, 4])
def test_a_step_is_traced_once_whatever_the_data(microbatches):
    chex.clear_trace_counter()
    loss = chex.assert_max_traces(linear, n=1)
    step, state = make_train_step(loss, SGD, microbatches=microbatches), linear_state()
    for i in range(4):
        batch = linear_batch()
        state, _ = step(state, np.float32(i), batch | {"x": batch["x"] * (i if i < 3 else np.nan)})
    assert (step._cache_size(), int(state.step), int(state.skipped)) == (1, 4, 1)
    with pytest.raises(AssertionError, match="traced > 1"):
        step(state, np.float32(0), linear_batch(16))


@pytest.mark.parametrize("where", ["nowhere", "on a device", "on a mesh"])
def test_a_step_is_compiled_once_wherever_the_parameters_were_put(where, caplog):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    places = {
        "nowhere": lambda x: x,
        "on a device": lambda x: jax.device_put(x, jax.devices()[3]),
        "on a mesh": lambda x: jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())),
    }
    counting = optax.GradientTransformation(lambda params: {"n": 0}, lambda up, state, _: (up, {"n": state["n"] + 1}))
    adam = optax.chain(optax.adam(0.1), counting)  # which begins with a number of Python
    state = init_state(places[where](linear_state().params), adam, jax.random.key(0), extra={"beta": 0.1})
    step = make_train_step(linear, adam)
    with jax.log_compiles():
        for _ in range(3):
            state, _ = step(state, np.float32(0), linear_batch())
    assert len([r for r in caplog.messages if "Finished XLA compilation of jit(train_step)" in r]) == 1
    assert state.opt_state[1]["n"] == 3


def noise(microbatches, steps=3, seed=0):
    step, state, out = linear_step(microbatches), linear_state(seed=seed), []
    for _ in range(steps):
        state, metrics = step(state, np.float32(0), linear_batch())
        out.append(np.asarray(metrics["noise"]))
    return np.stack(out)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_every_step_and_every_microbatch_has_random_numbers_of_its_own(microbatches):
    """And every run the same ones."""
    drawn = noise(microbatches)
    assert len(np.unique(drawn)) == drawn.size == 24
    np.testing.assert_array_equal(noise(microbatches), drawn)
    assert not np.isin(noise(microbatches, seed=1), drawn).any()


def test_the_random_numbers_of_a_step_are_addressed_by_its_number():
    """A run that resumes needs the key that it began with and the number of its step."""
    state = linear_state().replace(step=jnp.int32(2))
    _, metrics = linear_step(1)(state, np.float32(0), linear_batch())
    np.testing.assert_array_equal(metrics["noise"], noise(1)[2])


def test_the_key_of_a_run_never_changes():
    state, _ = linear_step(1)(linear_state(seed=4), np.float32(0), linear_batch())
    np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(jax.random.key(4)))


def test_a_rerun_is_the_same_run_to_the_last_bit(params):
    batch = make_batch("grpo", "sequence_mean")
    first, again = (run("grpo", params, batch, 4, steps=3) for _ in range(2))
    plain = lambda result: jax.tree.map(np.asarray, (result[0].params, result[0].opt_state, result[1]))
    jax.tree.map(np.testing.assert_array_equal, plain(first), plain(again))
    assert first[0].step == 3


def test_a_small_learning_rate_moves_the_weights(params):
    """In bfloat16 a hundred updates of 1e-6 would round to nothing."""
    optimizer, batch = optimizers.adamw(1e-6), make_batch("sft", "token_mean")
    step, state = make_train_step(LOSSES["sft"], optimizer), init_state(params, optimizer, jax.random.key(0))
    start = jax.device_get(state.params)
    for _ in range(100):
        state, _ = step(state, None, batch)
    moved = [np.asarray(a != b).ravel() for a, b in zip(*map(jax.tree.leaves, (start, state.params)))]
    assert np.concatenate(moved).mean() > 0.5


def test_a_model_of_flax_linen_learns(params):
    batch = make_batch("sft", "token_mean")
    _, start = run("sft", params, batch, 2)
    state, metrics = run("sft", params, batch, 2, steps=100)
    assert metrics["loss"] < 0.6 * start["loss"]
    assert jax.tree.structure(state.params) == jax.tree.structure(params)


@pytest.mark.parametrize("microbatches", [3, 16])
def test_a_batch_that_does_not_divide_is_refused_before_anything_is_compiled(microbatches):
    def never(*_):
        pytest.fail("the loss was traced")

    step, state = make_train_step(never, SGD, microbatches=microbatches), linear_state()
    with pytest.raises(ValueError, match=rf"batch\['weights'\] has 8 rows, which {microbatches} microbatches"):
        step(state, None, {"weights": np.zeros(8, np.float32), "x": np.zeros((48, 2), np.float32)})
    assert not state.params["w"].is_deleted()


def test_the_leaf_that_does_not_divide_is_named_by_its_path():
    step = make_train_step(LOSSES["dpo"], SGD, microbatches=2)
    batch = make_batch("dpo", "row_mean")
    batch["rejected"]["tokens"] = batch["rejected"]["tokens"][:7]
    with pytest.raises(ValueError, match=r"batch\['rejected'\]\['tokens'\] has 7 rows, which 2 micro"):
        step(linear_state(), None, batch)


@pytest.mark.parametrize("microbatches", [0, -1])
def test_a_number_of_microbatches_that_is_none(microbatches):
    with pytest.raises(ValueError, match=f"microbatches must be above 0, got {microbatches}"):
        make_train_step(linear, SGD, microbatches=microbatches)
