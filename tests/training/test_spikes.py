"""Loss spikes: seen in the metrics, and skipped when asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pt_jax.training import init_state, make_train_step, spikes

SGD = optax.sgd(0.01)
SPIKE = 9


def loss_fn(params, frozen, batch, key):
    return jnp.sum(batch["scale"] * (1 + 0.1 * jnp.square(params["w"] - batch["x"]))), {}


def batch_of_step(i, factor=100.0):
    x = np.random.default_rng(i).normal(size=(1,)).astype(np.float32)
    return {"x": x, "scale": np.float32([factor if i == SPIKE else 1.0])}


def train(steps, window=6, sigmas=6.0, batch_of_step=batch_of_step):
    guard = {"skip_when": spikes.far_above(sigmas), "after": [spikes.remember]} if window else {}
    step, log, states = make_train_step(loss_fn, SGD, **guard), [], []
    extra = {"spikes": spikes.history(window)} if window else None
    state = init_state({"w": jnp.zeros(1)}, SGD, jax.random.key(0), extra=extra)
    for i in range(steps):
        state, metrics = step(state, None, batch_of_step(i))
        log.append({k: float(v) for k, v in metrics.items()})
        states.append(jax.tree.map(np.asarray, (state.params, state.opt_state, state.extra)))
    return log, states, state


def test_a_spike_is_reported_and_trained_on_without_the_guard():
    log, states, _ = train(11, window=0)
    assert log[SPIKE]["loss"] > 50 * log[SPIKE - 1]["loss"]
    assert [x["skipped"] for x in log] == [0.0] * 11
    assert (states[SPIKE][0]["w"] != states[SPIKE - 1][0]["w"]).all()


def test_a_spike_is_skipped_with_it_and_changes_nothing():
    log, states, state = train(11)
    assert [i for i, x in enumerate(log) if x["skipped"]] == [SPIKE]
    assert log[SPIKE]["loss"] > 50 * log[SPIKE - 1]["loss"]  # and is seen
    jax.tree.map(np.testing.assert_array_equal, states[SPIKE], states[SPIKE - 1])
    kept = [x["loss"] for i, x in enumerate(log) if i != SPIKE][-6:]
    np.testing.assert_allclose(np.sort(state.extra["spikes"]["loss"]), np.sort(kept), rtol=1e-6)


@pytest.mark.parametrize("name", spikes.LOOKED_AT)
@pytest.mark.parametrize("sigmas", [1.0, 6.0])
def test_far_is_so_many_deviations_above_the_mean_of_the_window(name, sigmas):
    past = np.random.default_rng(0).normal(3, 0.1, 16)
    edge = past.mean() + sigmas * past.std()
    flat = {"loss": jnp.full(16, 1.0), "grad_norm": jnp.full(16, 1.0)}
    state = init_state({}, SGD, None, extra={"spikes": flat | {name: jnp.float32(past)}})
    for value, expected in [(edge * 1.001, True), (edge * 0.999, False), (-9.0, False)]:
        assert spikes.far_above(sigmas)(state, {"loss": 1.0, "grad_norm": 1.0, name: value}) == expected


def test_nothing_is_skipped_before_the_window_is_full():
    assert not any(x["skipped"] for x in train(11, window=SPIKE + 1)[0])
    assert sum(x["skipped"] for x in train(11, window=SPIKE)[0]) == 1


def test_a_loss_that_does_not_change_is_no_spike():
    """Its deviation is 0, and its mean may be below it by rounding."""
    still = lambda i: {"x": np.float32([0.0]), "scale": np.float32([0.1])}
    assert not any(x["skipped"] for x in train(9, window=3, batch_of_step=still)[0])


def test_a_state_without_a_history_is_refused():
    for guard in ({"skip_when": spikes.far_above()}, {"after": [spikes.remember]}):
        state = init_state({"w": jnp.zeros(1)}, SGD, jax.random.key(0))
        with pytest.raises(ValueError, match=r'no history; make it with init_state\(..., extra=\{"spikes"'):
            make_train_step(loss_fn, SGD, **guard)(state, None, batch_of_step(0))


@pytest.mark.parametrize(("call", "name"), [(spikes.far_above, "sigmas"), (spikes.history, "window")])
def test_a_number_out_of_range_is_refused(call, name):
    with pytest.raises(ValueError, match=f"{name} must be above 0, got 0"):
        call(0)
