"""Moments in few bits: unbiased, never stuck, as small as is said, and a run that is near the one in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pt_jax import models
from pt_jax.recipes import sft
from pt_jax.training import init_state, make_train_step, moments, optimizers, sharding
from pt_jax.weights import token_mean

KINDS = {"bfloat16": (moments.BFloat16, 2.0**-7), "8 bits": (moments.Float8, 2.0**-3)}
EVERY_KIND = pytest.mark.parametrize(("kind", "unit"), KINDS.values(), ids=KINDS)
IN = {"bfloat16": moments.in_bfloat16, "8 bits": moments.in_8_bits}
EVERY = pytest.mark.parametrize("small", IN.values(), ids=IN)


def spread():
    """Numbers of both signs over many sizes, zeros, powers of two, and rows that are 0 altogether."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(9, 40)) * 10.0 ** rng.uniform(-3, 3, (9, 40))
    x[0, :7] = [0, 1, -1, 2, 0.5, 448, -0.25]
    x[3] = 0
    x[4] *= 1e-30
    x[5] *= 1e30
    return jnp.float32(x)


def draws(n):
    return jax.random.uniform(jax.random.key(n), (9, 40))


@EVERY_KIND
def test_what_is_kept_is_one_of_the_two_neighbours(kind, unit):
    """The nearest number that the format has, below or above; in 8 bits, of the row's scale."""
    x = np.float64(spread())
    got = np.float64(kind.of(spread(), draws(0)).read())
    least = np.abs(x).max(-1, keepdims=True) / 448 * 2.0**-6 if kind is moments.Float8 else 0
    assert (np.abs(got - x) <= unit * np.maximum(np.abs(x), least) * (1 + 1e-6)).all()
    assert (np.abs(got - x) > 0.1 * unit * np.abs(x)).mean() > 0.3  # it does round
    assert (got[3] == 0).all() and got[0, 0] == 0


@EVERY_KIND
def test_the_mean_over_the_draws_is_the_number(kind, unit):
    x = spread()
    every = jax.jit(jax.vmap(lambda n: kind.of(x, jax.random.uniform(jax.random.key(n), x.shape)).read()))
    got = np.float64(every(jnp.arange(4000)))
    error, deviation = got.mean(0) - np.float64(x), got.std(0) / np.sqrt(4000)
    assert (np.abs(error) <= 5 * deviation + 1e-6 * np.abs(x)).all()


@EVERY_KIND
def test_what_the_format_has_stays_what_it_is(kind, unit):
    """So a moment that does not move does not wander."""
    once = kind.of(spread(), draws(0)).read()
    np.testing.assert_allclose(kind.of(once, draws(1)).read(), once, rtol=1e-6)


def test_draws_are_uniform_and_share_nothing():
    """Over the entries of an array, with those beside them, of another array and of the next update."""
    draws = lambda count, leaf: np.asarray(moments._draws((3, 100, 200), jnp.int32(count), leaf)).astype(np.float64)
    x = draws(5, 2)
    assert x.min() >= 0 and x.max() < 1
    counts = np.histogram(x, 64, (0, 1))[0]
    assert ((counts - x.size / 64) ** 2 / (x.size / 64)).sum() < 110  # chi-squared of 63, one in 5000
    for other in (draws(6, 2), draws(5, 3), np.roll(x, 1, 2), np.roll(x, 1, 1), np.roll(x, 1, 0), draws(2, 5)):
        assert abs(np.corrcoef(x.ravel(), other.ravel())[0, 1]) < 4 / np.sqrt(x.size)


PARAMS = {"w": jnp.zeros((64, 64)), "norm": jnp.zeros(64)}
ADAM = optax.scale_by_adam(b2=0.999)


@EVERY
def test_a_second_moment_is_followed_by_thousandths(small):
    """To 7.8 in 2000 steps; to the nearest bfloat16 it stands still as soon as a step changes it by less than 1/256."""
    second = {}
    for name, optimizer in {"full": ADAM, "small": small(ADAM)}.items():
        turn = lambda i, state, optimizer=optimizer: optimizer.update({"w": jnp.full((64, 64), 3.0)}, state)[1]
        rise = jax.jit(lambda state, turn=turn: jax.lax.fori_loop(0, 2000, turn, state))
        second[name] = rise(optimizer.init({"w": jnp.zeros((64, 64))}))
    exact, got = second["full"].nu["w"], second["small"].inner.nu["w"].read()
    np.testing.assert_allclose(exact, 9 * (1 - 0.999**2000), rtol=1e-3)
    np.testing.assert_allclose(got.mean(), exact.mean(), rtol=0.01)  # of 4096 entries
    assert np.abs(got / exact - 1).max() < 0.3
    nearest = np.float32(0)
    for _ in range(2000):
        nearest = np.float32(jnp.bfloat16(0.999 * nearest + 0.001 * 9))
    assert nearest < 0.5 * exact.mean()


def test_a_rerun_is_the_same_to_the_last_bit():
    def run():
        optimizer = moments.in_8_bits(ADAM)
        state, update = optimizer.init(PARAMS), jax.jit(optimizer.update)
        for i in range(3):
            slopes = jax.tree.map(
                lambda x, i=i: np.random.default_rng(i).normal(size=x.shape).astype(np.float32), PARAMS
            )
            updates, state = update(slopes, state)
        return updates, state

    jax.tree.map(np.testing.assert_array_equal, run(), run())


@pytest.mark.parametrize(
    ("optimizer", "small", "expected"),
    [
        # a moment of 4096 entries in its bytes, and in 8 bits 64 scales; one of 64 stays; the counts
        (optimizers.adamw(0.1), moments.in_bfloat16, 2 * (4096 * 2 + 64 * 4) + 8),
        (optimizers.adamw(0.1), moments.in_8_bits, 4096 * 2 + 4096 + 64 * 4 + 2 * 64 * 4 + 8),
        (optimizers.lion(0.1), moments.in_8_bits, 4096 + 64 * 4 + 64 * 4 + 8),
        (optimizers.sgd(0.1, momentum=0.9), moments.in_bfloat16, 4096 * 2 + 64 * 4 + 4),
    ],
)
def test_the_bytes_are_those_that_are_said(optimizer, small, expected):
    assert sum(x.nbytes for x in jax.tree.leaves(small(optimizer).init(PARAMS))) == expected


def test_arrays_below_the_least_size_stay_as_they_are():
    state = moments.in_8_bits(optax.adam(0.1), least=4097).init(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, state.inner, optax.adam(0.1).init(PARAMS))


CONFIG = models.Config(vocab=32, layers=2, width=32, heads=4, kv_heads=2, head_width=8, hidden=48, tied=False)
TOKENS = np.random.default_rng(0).integers(0, 32, (8, 12)).astype(np.int32)
BATCH = {"tokens": TOKENS, "seen": np.ones((8, 12), bool), "mask": np.ones((8, 12), bool) & (np.arange(12) > 0)}
BATCH["weights"] = np.asarray(token_mean(BATCH["mask"]))


@functools.cache
def losses(name):
    """Of a small decoder that learns eight rows by heart, with every matrix's moments in few bits."""
    small = {"float32": lambda optimizer, least: optimizer}.get(name) or IN[name]
    optimizer = small(optimizers.adamw(3e-3, b2=0.99), least=500)
    step = make_train_step(sft.make_loss(models.bind(CONFIG).apply), optimizer)
    state, out = init_state(models.init(CONFIG, jax.random.key(0)), optimizer, jax.random.key(0)), []
    program = step.lower(state, None, BATCH).compile({"xla_backend_optimization_level": 0})
    for _ in range(60):
        state, metrics = program(state, None, BATCH)
        out.append(float(metrics["loss"]))
    return np.array(out)


@pytest.mark.parametrize("name", IN)
def test_a_run_is_near_the_one_in_float32(name):
    full, got = losses("float32"), losses(name)
    assert full[0] > 3 and full[-1] < 0.5
    assert np.abs(got - full).max() < {"bfloat16": 0.005, "8 bits": 0.01}[name]


@EVERY
def test_small_moments_lie_on_a_mesh_as_their_parameters_do(small):
    optimizer = small(optimizers.adamw(0.1), least=256)
    state = init_state(models.init(CONFIG, jax.random.key(0)), optimizer, jax.random.key(0))
    layout = sharding.by_name(state, sharding.make_mesh(2, 2, 2))
    adam = next(x for x in jax.tree.leaves(layout.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu"))
    for moment in (adam.mu, adam.nu):
        assert moment["layers"]["wq"].values == layout.params["layers"]["wq"]
        assert moment["unembed"].values == layout.params["unembed"]
    jax.block_until_ready(jax.device_put(state, layout))


@EVERY
def test_a_least_size_of_nothing_is_refused(small):
    with pytest.raises(ValueError, match="least must be above 0, got 0"):
        small(optax.adam(0.1), least=0)
