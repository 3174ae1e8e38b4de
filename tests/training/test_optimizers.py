"""The usual optimiser against its equations, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pt_jax.training import optimizers


def rates(steps, **options):
    """The rate of each step, read off the updates: AdamW on a gradient that never changes moves by the rate."""
    optimizer = optimizers.adamw(0.01, steps, clip=1e9, **options)
    params = {"w": jnp.zeros(1)}
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    out = []
    for _ in range(steps):
        updates, state = update({"w": jnp.ones(1)}, state, params)
        out.append(-float(updates["w"][0]) / 0.01)
    return out


@pytest.mark.parametrize(
    ("steps", "options", "expected"),
    [
        (4, {}, [1, 3 / 4, 2 / 4, 1 / 4]),
        (4, {"final": 1.0}, [1, 1, 1, 1]),
        (4, {"final": 0.5}, [1, 7 / 8, 6 / 8, 5 / 8]),
        # warm-up from 1/4 to the peak at step 3, then down to 0 at step 10, which is never taken
        (10, {"warmup": 0.3}, [1 / 4, 2 / 4, 3 / 4, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]),
        (4, {"warmup": 0.5, "final": 1.0}, [1 / 3, 2 / 3, 1, 1]),
        (1, {"warmup": 0.1}, [1]),
    ],
)
def test_the_rate_rises_to_its_peak_and_falls_to_what_is_left(steps, options, expected):
    np.testing.assert_allclose(rates(steps, **options), expected, rtol=1e-4)


def test_no_update_is_lost_to_a_rate_of_zero():
    assert min(rates(20, warmup=0.5)) > 0


TREE = {
    "embed": np.array([[0.5, -1.0], [2.0, 0.1]]),
    "norm": np.array([1.0, 2.0]),
    "layers": {"attn_norm": np.array([[3.0]]), "wq": np.array([[[0.7]]])},
}


def gradients(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda x: rng.normal(size=x.shape) * 3, TREE)


def by_the_equations(steps, *, rate, decay, clip, b2, b1=0.9, eps=1e-8):
    """AdamW of Loshchilov and Hutter, algorithm 2, leaf by leaf; norms are not decayed."""
    decayed = {"embed": 1.0, "norm": 0.0, "layers": {"attn_norm": 0.0, "wq": 1.0}}
    params, m, v = TREE, *(jax.tree.map(np.zeros_like, TREE) for _ in range(2))
    for t in range(1, steps + 1):
        g = gradients(t)
        norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(g)))
        g = jax.tree.map(lambda x, norm=norm: x * min(1, clip / norm), g)
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, g)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, v, g)
        params = jax.tree.map(
            lambda p, m, v, d, t=t: p
            - rate(t - 1) * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * d * p),
            params, m, v, decayed,
        )  # fmt: skip
    return params


@pytest.mark.parametrize(("decay", "clip", "b2"), [(0.0, 1e9, 0.999), (0.3, 1e9, 0.95), (0.3, 0.5, 0.999)])
def test_three_steps_are_those_of_the_equations(decay, clip, b2):
    optimizer = optimizers.adamw(0.1, 5, weight_decay=decay, clip=clip, b2=b2)
    params = jax.tree.map(jnp.float32, TREE)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for t in (1, 2, 3):
        updates, state = update(jax.tree.map(np.float32, gradients(t)), state, params)
        params = optax.apply_updates(params, updates)
    expected = by_the_equations(3, rate=lambda t: 0.1 * (1 - t / 5), decay=decay, clip=clip, b2=b2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, expected)


def test_the_gradient_is_clipped_by_the_norm_of_all_of_it():
    """Under Adam the size of one gradient does not show; that of the next one, after a clip of this one, does."""

    def second_update(first, clip):
        optimizer = optimizers.adamw(0.1, 10, clip=clip)
        params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
        state = optimizer.init(params)
        _, state = optimizer.update({"a": jnp.float32([3 * first]), "b": jnp.float32([4 * first])}, state, params)
        return optimizer.update({"a": jnp.float32([0.01]), "b": jnp.float32([0.0])}, state, params)[0]

    # (3, 4) has norm 5: clipped to 1 it is (0.6, 0.8), ten times that is clipped to the same
    for a, b in zip(jax.tree.leaves(second_update(10.0, 1.0)), jax.tree.leaves(second_update(0.2, 1e9))):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, r"learning_rate must be above 0, got 0.0"),
        ({"learning_rate": float("nan")}, r"learning_rate must be above 0, got nan"),
        ({"clip": 0.0}, r"clip must be above 0, got 0.0"),
        ({"warmup": 1.0}, r"warmup must be in \[0.0, 1.0\), got 1.0"),
        ({"steps": 0}, r"steps must be above 0, got 0"),
        ({"final": 1.5}, r"final must be from 0 to 1, got 1.5"),
        ({"final": float("nan")}, r"final must be from 0 to 1, got nan"),
        ({"weight_decay": -0.1}, r"weight_decay must be in \[0.0, inf\), got -0.1"),
        ({"b2": 1.0}, r"b2 must be in \[0.0, 1.0\), got 1.0"),
        ({"warmup": -0.1}, r"warmup must be in \[0.0, 1.0\), got -0.1"),
    ],
)
def test_a_number_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        optimizers.adamw(**{"learning_rate": 0.1, "steps": 3} | options)


def test_norms_and_biases_are_not_decayed_whatever_the_tree():
    """Ours, flax's names, and a tree without names."""
    params = {"attn_norm": jnp.ones(1), "w": jnp.ones(1), "LayerNorm_0": {"scale": jnp.ones(1), "bias": jnp.ones(1)}}
    optimizer = optimizers.adamw(0.1, 10, weight_decay=0.5)
    zero = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    updates, _ = optimizer.update(zero(params), optimizer.init(params), params)
    moved = {
        jax.tree_util.keystr(path, simple=True, separator="/") for path, u in jax.tree.leaves_with_path(updates) if u[0]
    }
    assert moved == {"w"}
    listed = [jnp.ones(1), jnp.ones(1)]
    updates, _ = optimizer.update(zero(listed), optimizer.init(listed), listed)
    assert all(u[0] < 0 for u in updates)
