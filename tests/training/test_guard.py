"""A step that is not finite changes nothing but the counts; what is done after a step is guarded as the step is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_steps import SGD, linear, linear_batch, linear_state

from pt_jax.training import init_state, make_train_step, sharding


def poisoned(at, what, leaf="x"):
    """A batch a step; those of these numbers hold something that is not finite."""

    def batch(i):
        out = linear_batch()
        return out | ({leaf: np.where(np.arange(8) == 5, what, out[leaf].T).T.astype(np.float32)} if i in at else {})

    return batch


EVERYTHING = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.1))


def count_good(state, metrics):
    return state.replace(extra={"sum": state.extra["sum"] + metrics["sum"]}, averages=jax.tree.map(
        lambda a, p: 0.9 * a + 0.1 * p, state.averages, state.params
    ))  # fmt: skip


@functools.cache
def guarded_step(microbatches):
    return make_train_step(linear, EVERYTHING, microbatches=microbatches, after=[count_good])


def guarded_state():
    start = {"w": jnp.ones(3)}
    return init_state(start, EVERYTHING, jax.random.key(0), averages=start, extra={"sum": jnp.float32(0)})


def plain(tree):
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x), tree)


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize(("what", "leaf"), [(np.nan, "x"), (np.inf, "x"), (-np.inf, "weights"), (np.nan, "weights")])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(what, leaf, microbatches):
    """One row of one microbatch is enough. Without the guard, a clip by the norm makes every parameter NaN."""
    step, state, batch, seen = guarded_step(microbatches), guarded_state(), poisoned({1, 2}, what, leaf), []
    for i in range(5):
        state, metrics = step(state, np.float32(0), batch(i))
        seen.append((plain(state), int(metrics["skipped"])))
    assert [skipped for _, skipped in seen] == [0, 1, 1, 0, 0]
    assert [(int(s.step), int(s.skipped), int(s.bad)) for s, _ in seen] == [
        (1, 0, 0), (2, 1, 1), (3, 2, 2), (4, 2, 0), (5, 2, 0),
    ]  # fmt: skip
    counts = {"step": 0, "skipped": 0, "bad": 0}
    for s, _ in seen[1:3]:
        jax.tree.map(np.testing.assert_array_equal, s.replace(**counts), seen[0][0].replace(**counts))
    assert not np.array_equal(seen[3][0].params["w"], seen[2][0].params["w"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(seen[4][0]))


def test_a_loss_that_is_not_finite_is_enough():
    """Its gradient may be: the gradient of what is added to it is 0."""
    loss = lambda params, frozen, batch, key: (params["w"].sum() + frozen, {})
    step, state = make_train_step(loss, SGD), linear_state()
    state, metrics = step(state, np.float32(np.inf), linear_batch())
    assert (int(metrics["skipped"]), float(metrics["grad_norm"])) == (1, pytest.approx(3**0.5))
    np.testing.assert_array_equal(state.params["w"], np.ones(3))


def test_a_gradient_that_is_not_finite_is_enough():
    """The square root of 0 is 0, and has no slope."""
    loss = lambda params, frozen, batch, key: (jnp.sqrt(params["w"] * 0).sum(), {})
    state, metrics = make_train_step(loss, SGD)(linear_state(), None, linear_batch())
    assert (int(metrics["skipped"]), float(metrics["loss"])) == (1, 0.0)
    np.testing.assert_array_equal(state.params["w"], np.ones(3))


def test_a_row_that_is_not_finite_on_one_device_is_skipped_by_all():
    mesh = sharding.make_mesh(8)
    state, batch = guarded_state(), poisoned({1}, np.nan)
    layout = sharding.by_name(state, mesh)
    step = make_train_step(linear, EVERYTHING, after=[count_good], shardings=layout)
    state, seen = jax.device_put(state, layout), []
    for i in range(2):
        state, metrics = step(state, np.float32(0), jax.device_put(batch(i), sharding.rows(mesh)))
        seen.append([(float(s.data), w.data.tolist()) for s, w in zip(
            metrics["skipped"].addressable_shards, state.params["w"].addressable_shards
        )])  # fmt: skip
    assert [{skipped for skipped, _ in one} for one in seen] == [{0.0}, {1.0}]
    assert all(w == seen[0][0][1] for one in seen for _, w in one) and len(seen[0]) == 8


def test_averages_and_reference_lie_as_the_parameters_do():
    tree = {"embed": jnp.zeros((8, 4)), "layers": {"wq": jnp.zeros((2, 4, 2, 3)), "attn_norm": jnp.zeros((2, 4))}}
    state = init_state(tree, EVERYTHING, jax.random.key(0), averages=tree, reference=tree, extra={"kl": 0.1})
    layout = sharding.by_name(state, sharding.make_mesh(2, 2, 2))
    assert layout.averages == layout.reference == layout.params
    assert layout.params["layers"]["wq"].spec != layout.bad.spec == layout.extra["kl"].spec


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda state, metrics: state.replace(extra={"a": 1.0}), "extra"),
        (lambda state, metrics: state.replace(averages=state.params), "averages"),
        (lambda state, metrics: state.replace(params={"w": state.params["w"][:2]}), "params"),
        (lambda state, metrics: state.replace(params={"w": state.params["w"].astype(jnp.bfloat16)}), "params"),
    ],
)
def test_what_is_done_after_a_step_may_not_change_what_the_state_is_made_of(change, field):
    step = make_train_step(linear, SGD, after=[change])
    with pytest.raises(ValueError, match=f"state.{field} has another structure, type or shape after a step"):
        step(linear_state(), np.float32(0), linear_batch())


def test_a_step_waits_for_nothing_from_the_host_and_sends_it_nothing():
    step, state = guarded_step(4), guarded_state()
    batches = [jax.device_put(poisoned({1}, np.nan)(i)) for i in range(3)]
    frozen = jnp.float32(0)
    state, _ = step(state, frozen, batches[0])
    with jax.transfer_guard("disallow"):
        for batch in batches:
            state, _ = step(state, frozen, batch)
    assert (int(state.step), int(state.skipped)) == (4, 1)
