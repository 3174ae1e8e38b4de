"""The loop loses no step, fetches once an interval, and goes on where a state was left."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pt_jax.training import init_state, loop, make_train_step

OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def distance(params, frozen, batch, key):
    gap = params["w"][None] - batch["x"] + (0 if frozen is None else frozen)
    noise = jax.random.normal(key, gap.shape)  # a step that took another key would show
    return jnp.sum(gap**2 + noise * gap) / 4, {"rows": gap[:, 0], "mean": gap.mean()}


STEP = make_train_step(distance, OPTIMIZER)


def batch_of_step(i):
    return {"x": np.random.default_rng(i).normal(size=(4, 2)).astype(np.float32)}


def new_state():
    return init_state({"w": jnp.zeros(2)}, OPTIMIZER, jax.random.key(0))


def fit(state, steps, batch_of_step=batch_of_step, **options):
    seen = []
    state = loop.fit(
        state, STEP, batch_of_step, steps=steps, on_metrics=lambda *x: seen.append(x), **options
    )  # fmt: skip
    return state, seen


def test_the_metrics_of_every_step_come_in_order_as_floats():
    state, seen = fit(new_state(), 7, log_every=3)
    assert [number for number, _ in seen] == [1, 2, 3, 4, 5, 6, 7]
    assert int(state.step) == 7
    by_hand = new_state()
    for i, (_, values) in enumerate(seen):
        by_hand, metrics = STEP(by_hand, None, batch_of_step(i))
        assert values.keys() == {"loss", "mean", "grad_norm", "skipped"}  # what a row has stays on the device
        assert values == {name: float(metrics[name]) for name in values}
        assert {type(v) for v in values.values()} == {float}


@pytest.mark.parametrize(("steps", "log_every", "fetches"), [(12, 4, 3), (12, 5, 3), (3, 10, 1), (3, 1, 3)])
def test_metrics_are_fetched_once_an_interval(monkeypatch, steps, log_every, fetches):
    calls, device_get = [], jax.device_get

    def counted(tree):
        calls.append([number for number, _ in tree])
        return device_get(tree)

    monkeypatch.setattr(jax, "device_get", counted)
    _, seen = fit(new_state(), steps, log_every=log_every)
    assert len(calls) == fetches
    assert [n for call in calls for n in call] == [number for number, _ in seen] == [*range(1, steps + 1)]


def test_how_often_is_looked_changes_no_result():
    states = [fit(new_state(), 6, log_every=n)[0] for n in (1, 4, 100)]
    for other in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, states[0].params, other.params)


@pytest.mark.parametrize("left_at", [1, 2, 5, 6])
def test_a_state_goes_on_from_its_step_to_the_last_bit(left_at):
    straight, expected = fit(new_state(), 6, log_every=4)
    state, first = fit(new_state(), left_at, log_every=4)
    asked = []

    def remembered(i):
        asked.append(i)
        return batch_of_step(i)

    state, rest = fit(state, 6, remembered, log_every=4)
    assert asked == [*range(left_at, 6)]
    assert first + rest == expected
    of = lambda s: (s.params, s.opt_state, s.step)
    jax.tree.map(np.testing.assert_array_equal, of(state), of(straight))


def test_a_run_that_is_done_does_nothing():
    state, _ = fit(new_state(), 3)
    again, seen = fit(state, 3, lambda i: pytest.fail("a batch was made"))
    assert (int(again.step), seen) == (3, [])


def test_what_is_frozen_reaches_the_loss():
    (_, plain), (_, shifted) = fit(new_state(), 1), fit(new_state(), 1, frozen=jnp.float32(100))
    assert shifted[0][1]["loss"] > 100 * plain[0][1]["loss"]


@pytest.mark.parametrize("norm", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_ends_the_run_though_the_loss_is(norm):
    seen = []
    with pytest.raises(FloatingPointError, match=r"the gradient's norm of step 7 is (nan|inf); a lower learning rate"):
        loop.report(7, {"loss": 1.0, "grad_norm": np.float32(norm)}, lambda *x: seen.append(x))
    assert len(seen) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("log_every", [1, 10])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_its_step(bad, log_every):
    seen = []
    with pytest.raises(FloatingPointError, match=r"the loss of step 3 is (nan|inf); a lower learning rate"):
        loop.fit(
            new_state(), STEP, lambda i: {"x": batch_of_step(i)["x"] + (bad if i == 2 else 0)},
            steps=6, log_every=log_every, on_metrics=lambda number, values: seen.append(number),
        )  # fmt: skip
    assert seen == [1, 2, 3]  # what led there is logged, what came after it is not
