"""Moving averages against their definitions, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pt_jax.training import averages, init_state, make_train_step

SGD = optax.sgd(0.1)
START = {"w": jnp.array([1.0, -2.0]), "layers": {"b": jnp.array([0.5])}}


def noisy(params, frozen, batch, key):
    """A loss whose gradient is another one every step."""
    return jnp.vdot(params["w"], batch["x"][0]) + (params["layers"]["b"] * batch["x"][0, :1]).sum(), {}


def batch_of_step(i, bad=()):
    x = np.random.default_rng(i).normal(size=(1, 2)).astype(np.float32)
    return {"x": x * np.float32(np.nan if i in bad else 1)}


def train(rule, steps, bad=(), start=START):
    """The parameters after every update that was one, and the averages at the end."""
    step = make_train_step(noisy, SGD, after=[rule])
    state, path = init_state(start, SGD, jax.random.key(0), averages=start), []
    for i in range(steps):
        state, _ = step(state, None, batch_of_step(i, bad))
        if i not in bad:
            path.append(jax.tree.map(np.float64, state.params))
    return path, state


def weighted(path, shares):
    return jax.tree.map(lambda *x: sum(s * y for s, y in zip(shares, x)) / sum(shares), *path)


def assert_close(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), got, expected)


@pytest.mark.parametrize("bad", [(), (0, 3, 4)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_the_exponential_average_is_the_weighted_mean_of_all_updates(decay, bad):
    """With weights decay^(n - i), and nothing of where it began or of steps that were skipped."""
    path, state = train(averages.ema(decay), 9, bad)
    n = len(path)
    assert_close(state.averages, weighted(path, [decay ** (n - 1 - i) for i in range(n)]))


def test_a_long_horizon_is_not_lost_in_the_rounding_of_one_minus_decay():
    """1 - 0.9999999^3 in float32 has one digit."""
    path, state = train(averages.ema(0.9999999), 3)
    assert_close(state.averages, weighted(path, [1, 1, 1]))


@pytest.mark.parametrize(("start", "bad"), [(0, ()), (4, ()), (2, (1, 5)), (50, ())])
def test_polyaks_average_is_the_mean_from_its_start_on(start, bad):
    path, state = train(averages.polyak(start), 9, bad)
    assert_close(state.averages, weighted(path[start:] or path[-1:], [1] * max(1, len(path) - start)))


def test_averages_of_a_model_in_bfloat16_are_in_float32():
    coarse = jax.tree.map(lambda x: x.astype(jnp.bfloat16), START)
    _, state = train(averages.ema(0.9), 2, start=coarse)
    assert {x.dtype for x in jax.tree.leaves((state.averages, state.params))} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("rule", [averages.ema(0.9), averages.polyak()])
def test_a_state_without_averages_is_refused(rule):
    step = make_train_step(noisy, SGD, after=[rule])
    with pytest.raises(ValueError, match=r"no averages; make it with init_state\(..., averages=params\)"):
        step(init_state(START, SGD, jax.random.key(0)), None, batch_of_step(0))


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"decay must be in \[0.0, 1.0\)"):
        averages.ema(decay)


def test_a_negative_start_is_refused():
    with pytest.raises(ValueError, match="start must be in"):
        averages.polyak(-1)
