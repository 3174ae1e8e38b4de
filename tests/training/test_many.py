"""Many runs in one program are the runs by themselves, over one frozen base."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax.models import Config, bind, lora, parameters
from pt_jax.recipes import dpo
from pt_jax.training import averages, init_state, make_train_step, many, optimizers, schedules
from pt_jax.weights import row_mean, token_mean

CONFIG = Config(vocab=13, width=8, layers=2, heads=2, kv_heads=1, head_width=4, hidden=10, max_length=8)
HOW = lora.Adapter(rank=2, alpha=4.0)
BASE = parameters.init(CONFIG, jax.random.key(0))
RATES, BETAS = np.float32([0.01, 0.03, 0.1]), np.float32([0.05, 0.5, 2.0])
ROWS, COLUMNS = 4, 6
SGD = optimizers.sgd(1.0, clip=1e9)


def texts(seed):
    rng = np.random.default_rng(seed)
    seen = np.arange(COLUMNS) < np.array([6, 4, 3, 5])[:, None]
    mask = seen & (np.arange(COLUMNS) > 1)
    tokens = rng.integers(0, CONFIG.vocab, (ROWS, COLUMNS)).astype(np.int32)
    return {"tokens": tokens, "seen": seen, "mask": mask, "weights": np.asarray(token_mean(mask))}


def batch_of_step(i):
    rng = np.random.default_rng(i)
    batch = {"chosen": texts(2 * i), "rejected": texts(2 * i + 1), "weights": np.asarray(row_mean(np.ones(ROWS, bool)))}
    return batch | {name: -rng.uniform(3, 15, ROWS).astype(np.float32) for name in ("ref_chosen", "ref_rejected")}


def noisy(loss_fn):
    """With something random of the run, which a key that all share would show."""

    def loss_of_run(params, frozen, batch, key):
        loss, metrics = loss_fn(params, frozen, batch, key)
        return loss * (1 + 0.1 * jax.random.uniform(key)), metrics

    return loss_of_run


def optimizer_of(rate):
    return optimizers.adamw(schedules.cosine(rate, 6, warmup=0.3), weight_decay=0.1, eps=1e-4)


def step_of(rate, beta):
    loss_fn = lora.adapted(dpo.make_loss(bind(CONFIG).apply, beta=beta), HOW)
    return make_train_step(noisy(loss_fn), optimizer_of(rate), microbatches=2, after=[averages.ema(0.5)])


def state_of(seed):
    adapters = lora.init(jax.random.key(seed), BASE, HOW)
    return init_state(adapters, optimizer_of(1.0), jax.random.key(seed), averages=adapters)


@functools.cache
def compiled(runs):
    states = many.stack(state_of(seed) for seed in range(runs))
    numbers = {"rate": RATES[:runs], "beta": BETAS[:runs]}
    lowered = many.make_train_step(step_of).lower(states, (BASE, None), batch_of_step(0), numbers)
    return lowered.compile({"xla_backend_optimization_level": 0})


def train(seeds, steps=3):
    program = compiled(len(seeds))
    states, numbers = many.stack(state_of(seed) for seed in seeds), {"rate": RATES[seeds], "beta": BETAS[seeds]}
    for i in range(steps):
        states, metrics = program(states, (BASE, None), batch_of_step(i), numbers)
    return states, metrics


def solo(seed):
    step = step_of(float(RATES[seed]), float(BETAS[seed])).lower(state_of(seed), (BASE, None), batch_of_step(0))
    step, state = step.compile({"xla_backend_optimization_level": 0}), state_of(seed)
    for i in range(3):
        state, metrics = step(state, (BASE, None), batch_of_step(i))
    return state, metrics


def assert_close(got, expected):
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    jax.tree.map(lambda a, b: np.testing.assert_allclose(plain(a), plain(b), rtol=1e-5, atol=1e-6), got, expected)


def test_a_slice_is_the_run_by_itself():
    """Of other adapters, random numbers, rate and loss; in moments, averages and metrics too."""
    states, metrics = train([0, 1, 2])
    assert_close((many.at(states, 2), many.at(metrics, 2)), solo(2))
    a, b = many.at(states, 0).params["layers"]["wq"], many.at(states, 2).params["layers"]["wq"]
    assert np.abs(np.asarray(a["b"]) - np.asarray(b["b"])).max() > 1e-2


def test_the_frozen_base_is_in_memory_once():
    """Each run more takes the room of its own state, and of its numbers."""
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    size = lambda tree: sum(plain(x).nbytes for x in jax.tree.leaves(tree))
    one, three = (compiled(n).memory_analysis().argument_size_in_bytes for n in (1, 3))
    own = size(state_of(0))
    assert 2 * own <= three - one <= 2 * own + size(BASE) / 4


def linear(params, frozen, batch, key):
    return jnp.vdot(batch["x"].sum(0), params["w"]), {"x": batch["x"]}


def states_of(count):
    return many.stack(init_state({"w": jnp.full(2, 1.0 * i)}, SGD, jax.random.key(0)) for i in range(count))


def test_every_run_may_have_a_batch_and_a_base_of_its_own():
    step = many.make_train_step(lambda: make_train_step(linear, SGD), batch_axis=0, frozen_axis=0)
    x = np.random.default_rng(0).normal(size=(3, 5, 2)).astype(np.float32)
    states, metrics = step(states_of(3), np.zeros(3, np.float32), {"x": x}, {})
    np.testing.assert_allclose(states.params["w"], np.arange(3.0)[:, None] - x.sum(1), rtol=1e-5)
    np.testing.assert_array_equal(metrics["x"], x)


def test_a_run_that_is_not_finite_skips_its_step_alone():
    step = many.make_train_step(lambda: make_train_step(linear, SGD), batch_axis=0)
    x = np.ones((3, 5, 2), np.float32)
    x[1, 2, 0] = np.nan
    states, metrics = step(states_of(3), None, {"x": x}, {})
    np.testing.assert_array_equal(metrics["skipped"], [0, 1, 0])
    np.testing.assert_array_equal(states.bad, [0, 1, 0])
    np.testing.assert_array_equal(states.params["w"][1], [1, 1])
    assert (np.asarray(states.params["w"])[[0, 2], 0] != [0, 2]).all()


def test_it_is_one_program_whatever_is_swept():
    step, states = (
        many.make_train_step(lambda rate: make_train_step(linear, optimizers.sgd(rate, clip=1e9))),
        states_of(2),
    )
    for i in range(3):
        states, _ = step(states, None, {"x": np.ones((5, 2), np.float32)}, {"rate": np.float32([i + 1, 0.5])})
    assert step._cache_size() == 1


def test_the_states_are_consumed():
    step, states = many.make_train_step(lambda: make_train_step(linear, SGD)), states_of(2)
    step(states, None, {"x": np.ones((5, 2), np.float32)}, {})
    assert states.params["w"].is_deleted()


def test_runs_spread_over_devices():
    """Eight runs on eight devices: each computes its own."""
    mesh = jax.make_mesh((8,), ("runs",), axis_types=(jax.sharding.AxisType.Auto,))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("runs"))
    step = many.make_train_step(lambda rate: make_train_step(linear, optimizers.sgd(rate, clip=1e9)), shardings=where)
    batch, rates = {"x": np.ones((5, 2), np.float32)}, np.arange(1, 9, dtype=np.float32)
    spread, _ = step(jax.device_put(states_of(8), where), None, batch, {"rate": jax.device_put(rates, where)})
    assert {s.data.shape for s in spread.params["w"].addressable_shards} == {(1, 2)}
    alone, _ = many.make_train_step(lambda rate: make_train_step(linear, optimizers.sgd(rate, clip=1e9)))(
        states_of(8), None, batch, {"rate": rates}
    )
    np.testing.assert_allclose(spread.params["w"], alone.params["w"], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: many.stack([]), "states is empty"),
        (lambda: many.stack([{"w": jnp.zeros(2)}, {"w": jnp.zeros(3)}]), r"states\[1\] has another structure"),
        (lambda: many.make_train_step(step_of)(states_of(3), None, {}, {"rate": np.ones(2, np.float32)}),
         r"rate has shape \(2,\), expected a number for each of 3 runs"),
        (lambda: many.make_train_step(step_of)(many.at(states_of(3), 0), None, {}, {}), "states is of one run; stack"),
    ],
)  # fmt: skip
def test_bad_input_gets_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
