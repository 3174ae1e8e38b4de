"""A reference in the state: TR-DPO against the same done by hand, outside of the step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pt_jax.losses import preference
from pt_jax.training import init_state, make_train_step, references

ADAM = optax.adam(0.05)
PARAMS = {"w": jnp.array([0.3, -0.2, 0.1])}


def trdpo(params, frozen, batch, key):
    """DPO of a linear policy; its reference and what else is frozen are arguments."""
    reference, beta = frozen
    logps = lambda tree, side: -jnp.square(batch[side] @ tree["w"] - 1)
    sides = [logps(tree, side) for tree in (params, reference) for side in ("chosen", "rejected")]
    return jnp.mean(preference.dpo(*sides, beta=beta)), {}


def batch_of_step(i):
    rng = np.random.default_rng(i)
    batch = {side: rng.normal(size=(4, 3)).astype(np.float32) for side in ("chosen", "rejected")}
    return batch if i != 3 else batch | {"chosen": batch["chosen"] * np.float32(np.nan)}


def by_hand(every, alpha, steps):
    """A plain loop, with the reference outside of the state; step 3 is bad and counts for nothing."""
    params, reference, opt_state, done = PARAMS, PARAMS, ADAM.init(PARAMS), 0
    slopes = jax.jit(jax.grad(lambda *x: trdpo(*x, None)[0]))
    for i in range(steps):
        if i == 3:
            continue
        updates, opt_state = ADAM.update(slopes(params, (reference, 0.7), batch_of_step(i)), opt_state)
        params, done = optax.apply_updates(params, updates), done + 1
        if done % every == 0:
            reference = jax.tree.map(lambda p, r: alpha * p + (1 - alpha) * r, params, reference)
    return params, reference


@pytest.mark.parametrize(("every", "alpha"), [(1, 0.1), (3, 0.6), (2, 1.0), (100, 0.6)])
def test_the_reference_follows_the_policy_as_often_and_as_far_as_is_said(every, alpha):
    step = make_train_step(
        trdpo, ADAM, frozen_of=references.beside, after=[references.follow(every=every, alpha=alpha)]
    )
    state = init_state(PARAMS, ADAM, jax.random.key(0), reference=PARAMS)
    for i in range(8):
        state, _ = step(state, jnp.float32(0.7), batch_of_step(i))
    params, reference = by_hand(every, alpha, 8)
    np.testing.assert_allclose(state.params["w"], params["w"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.reference["w"], reference["w"], rtol=1e-5, atol=1e-6)
    assert step._cache_size() == 1
    if every == 100:
        np.testing.assert_array_equal(state.reference["w"], PARAMS["w"])


def test_the_reference_is_an_argument_of_the_program_and_no_constant():
    """Closed over, it would be in the program, and stay what it was."""
    step = make_train_step(trdpo, ADAM, frozen_of=references.beside)
    losses = []
    for w in (0.0, 0.9):
        state = init_state(PARAMS, ADAM, jax.random.key(0), reference={"w": jnp.full(3, w)})
        losses.append(float(step(state, jnp.float32(0.7), batch_of_step(0))[1]["loss"]))
    assert abs(losses[0] - losses[1]) > 1e-3 and step._cache_size() == 1


def test_with_adapters_the_reference_is_a_copy_of_them():
    """The base is frozen, once; only adapters are in the state."""
    base, x = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)

    def distance(params, frozen, batch, key):
        """Of the policy's values from 1 + the reference's."""
        weight, reference = frozen
        values = lambda adapters: batch["x"] @ (weight.T + adapters["a"] @ adapters["b"])
        return jnp.mean(jnp.square(values(params) - values(reference) - 1)), {}

    adapters = {"a": jnp.ones((3, 2)), "b": jnp.zeros((2, 5))}
    step = make_train_step(
        distance, ADAM, frozen_of=lambda state, frozen: (frozen[0], state.reference),
        after=[references.follow(every=2, alpha=1.0)],
    )  # fmt: skip
    state, losses = init_state(adapters, ADAM, jax.random.key(0), reference=adapters), []
    for _ in range(4):
        state, metrics = step(state, (base, None), {"x": x})
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose([losses[0], losses[2]], 1, rtol=1e-6)  # the reference is the policy
    assert losses[1] != losses[0] and losses[3] != losses[2]
    jax.tree.map(np.testing.assert_array_equal, state.reference, state.params)


def test_a_state_without_a_reference_is_refused():
    step = make_train_step(lambda params, *_: (params["w"].sum(), {}), ADAM, after=[references.follow(every=1)])
    with pytest.raises(ValueError, match=r"no reference; make it with init_state\(..., reference=params\)"):
        step(init_state(PARAMS, ADAM, jax.random.key(0)), None, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [({"every": 0}, "every must be above 0, got 0"), ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5")],
)
def test_a_number_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        references.follow(**options)
