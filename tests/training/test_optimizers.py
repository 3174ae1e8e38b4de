"""The usual optimisers against their equations, in float64, matrix by matrix."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import jit

from pt_jax.models import Config, lora, parameters
from pt_jax.training import init_state, make_train_step, moments, optimizers, schedules, sharding

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


def three_steps(optimizer, params, gradients):
    """The parameters after gradients(1), (2) and (3)."""
    params = jax.tree.map(jnp.float32, params)
    state = optimizer.init(params)
    update = jit(optimizer.update)
    for t in (1, 2, 3):
        updates, state = update(jax.tree.map(np.float32, gradients(t)), state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize(("decay", "clip", "b2"), [(0.0, 1e9, 0.999), (0.3, 1e9, 0.95), (0.3, 0.5, 0.999)])
def test_three_steps_are_those_of_the_equations(decay, clip, b2):
    rate = schedules.linear(0.1, 5)
    params = three_steps(optimizers.adamw(rate, weight_decay=decay, clip=clip, b2=b2), TREE, gradients)
    expected = by_the_equations(3, rate=lambda t: 0.1 * (1 - t / 5), decay=decay, clip=clip, b2=b2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, expected)


def test_the_gradient_is_clipped_by_the_norm_of_all_of_it():
    """Under Adam the size of one gradient does not show; that of the next one, after a clip of this one, does."""

    def second_update(first, clip):
        optimizer = optimizers.adamw(0.1, clip=clip)
        params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
        state = optimizer.init(params)
        _, state = optimizer.update({"a": jnp.float32([3 * first]), "b": jnp.float32([4 * first])}, state, params)
        return optimizer.update({"a": jnp.float32([0.01]), "b": jnp.float32([0.0])}, state, params)[0]

    # (3, 4) has norm 5: clipped to 1 it is (0.6, 0.8), ten times that is clipped to the same
    for a, b in zip(jax.tree.leaves(second_update(10.0, 1.0)), jax.tree.leaves(second_update(0.2, 1e9))):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_norms_and_biases_are_not_decayed_whatever_the_tree():
    """Ours, flax's names, and a tree without names."""
    params = {"attn_norm": jnp.ones(1), "w": jnp.ones(1), "LayerNorm_0": {"scale": jnp.ones(1), "bias": jnp.ones(1)}}
    optimizer = optimizers.adamw(0.1, weight_decay=0.5)
    zero = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    updates, _ = optimizer.update(zero(params), optimizer.init(params), params)
    moved = {
        jax.tree_util.keystr(path, simple=True, separator="/") for path, u in jax.tree.leaves_with_path(updates) if u[0]
    }
    assert moved == {"w"}
    listed = [jnp.ones(1), jnp.ones(1)]
    updates, _ = optimizer.update(zero(listed), optimizer.init(listed), listed)
    assert all(u[0] < 0 for u in updates)


# ---- the other optimisers, on a stack of layers

CONFIG = Config(
    vocab=9, width=6, layers=3, heads=2, kv_heads=1, head_width=4, hidden=7, max_length=8, qk_norm=True, tied=False
)
SHAPES = parameters.shapes(CONFIG)
PARAMS = jax.tree.map(
    lambda s: np.random.default_rng(len(s)).normal(size=s), SHAPES, is_leaf=lambda s: isinstance(s, tuple)
)
# the axes of a layer's matrix, inputs first, as [inputs, outputs]
MATRICES = {
    "wq": (6, 8), "wk": (6, 4), "wv": (6, 4), "wo": (8, 6), "gate": (6, 7), "up": (6, 7), "down": (7, 6),
}  # fmt: skip


def slopes(t):
    rng = np.random.default_rng(100 + t)
    return jax.tree.map(lambda x: rng.normal(size=x.shape), PARAMS)


def layer(tree, name, i):
    """A layer's matrix [inputs, outputs], from the stack."""
    return tree["layers"][name][i].reshape(MATRICES[name])


def newton_schulz(x, steps=5):
    """Jordan et al.: five steps of an odd polynomial that sends every singular value to about 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = x.T if x.shape[0] > x.shape[1] else x
    y = wide / (np.linalg.norm(wide) + 1e-8)
    for _ in range(steps):
        gram = y @ y.T
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.T if x.shape[0] > x.shape[1] else y


def muon_by_hand(name, i, rate, decay, beta=0.95):
    """Of one matrix of one layer, by itself."""
    w, m = layer(PARAMS, name, i), 0
    for t in (1, 2, 3):
        g = layer(slopes(t), name, i)
        m = beta * m + (1 - beta) * g
        # Nesterov's look ahead, both parts without their bias
        ahead = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        w = w - rate * (0.2 * np.sqrt(max(w.shape)) * newton_schulz(ahead) + decay * w)
    return w


def test_muon_is_that_of_each_matrix_of_each_layer():
    """A stack taken as one matrix, or heads or layers mixed up, is another update. What is no matrix of a layer gets
    AdamW: also the stacks of norms, which have two axes and are no matrices."""
    params = three_steps(optimizers.muon(0.02, weight_decay=0.1, clip=1e9), PARAMS, slopes)
    for name in MATRICES:
        for i in range(CONFIG.layers):
            got = np.asarray(params["layers"][name][i]).reshape(MATRICES[name])
            np.testing.assert_allclose(got, muon_by_hand(name, i, 0.02, 0.1), rtol=1e-4, atol=2e-6)
    adam = three_steps(optimizers.adamw(0.02, weight_decay=0.1, clip=1e9), PARAMS, slopes)
    rest = lambda tree: {k: v for k, v in (tree | tree["layers"]).items() if k not in {*MATRICES, "layers"}}
    assert {"embed", "unembed", "norm", "attn_norm", "q_norm"} <= rest(adam).keys()
    jax.tree.map(np.testing.assert_array_equal, rest(params), rest(adam))


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        (("layers", "expert_gate"), (2, 4, 6, 7), ((-2,), (-1,))),  # one matrix an expert
        (("layers", "expert_down"), (2, 4, 7, 6), ((-2,), (-1,))),
        (("layers", "router"), (2, 6, 4), ((-2,), (-1,))),
        (("layers", "wq", "a"), (2, 6, 3), ((-2,), (-1,))),
        (("layers", "wq", "b"), (2, 3, 2, 5), ((-3,), (-2, -1))),
        (("layers", "wo", "a"), (2, 2, 5, 3), ((-3, -2), (-1,))),
        (("layers", "expert_up", "a"), (2, 4, 6, 3), ((-2,), (-1,))),
        (("layers", "wo", "m"), (2, 6), None),
        (("layers", "wq_bias"), (2, 2, 5), None),
        (("embed", "a"), (6, 3), None),
        (("Dense_0", "kernel"), (6, 3), ((-2,), (-1,))),
        (("Conv_0", "kernel"), (3, 6, 3), None),
        (("w",), (6, 3), None),
    ],
)
def test_the_axes_of_a_matrix_are_those_of_its_equation(path, shape, expected):
    tree = functools.reduce(lambda inner, name: {name: inner}, reversed(path), np.zeros(shape))
    found = functools.reduce(lambda tree, name: tree[name], path, optimizers.dimensions(tree))
    assert found is None if expected is None else tuple(found) == expected


def adafactor_by_hand(w, gradients, rate, decay, axes):
    """Of one array by itself; factored over the two last axes when ``axes``."""
    w, rows, columns, v = w.copy(), 0, 0, 0
    for t, g in enumerate(gradients, 1):
        b2 = 1 - t**-0.8
        square = g**2 + 1e-30
        if axes:
            rows, columns = b2 * rows + (1 - b2) * square.mean(-1), b2 * columns + (1 - b2) * square.mean(-2)
            v = rows[:, None] * columns[None] / rows.mean()
        else:
            v = b2 * v + (1 - b2) * square
        u = g / np.sqrt(v)
        u = u / max(1, np.sqrt((u**2).mean()) / 0.9)
        w = w - rate * (u + decay * w)
    return w


def test_adafactor_is_that_of_each_matrix_of_each_layer():
    """An update that is clipped over the whole stack would make layers depend on each other."""
    big = {"layers": {"up": (2, 128, 160), "wq": (2, 6, 2, 5), "attn_norm": (2, 6)}, "embed": (9, 6)}
    is_shape = lambda s: isinstance(s, tuple)
    fresh = lambda seed: jax.tree.map(lambda s: np.random.default_rng(seed).normal(size=s), big, is_leaf=is_shape)
    # the layers are of other sizes, and a sudden large gradient is clipped
    size = lambda path, x: x * (np.array([1.0, 30.0]).reshape(2, *[1] * (x.ndim - 1)) if path[0].key == "layers" else 1)
    gradients = lambda t: jax.tree.map_with_path(lambda p, x: size(p, x) * (9 if t == 3 else 1), fresh(t))
    start = fresh(0)
    got = three_steps(
        optimizers.adafactor(0.05, threshold=0.9, weight_decay=0.1, decayed=optimizers.all_but(), clip=1e9),
        start, gradients,
    )  # fmt: skip
    for name, factored in (("up", True), ("wq", False)):
        for i in range(2):
            g = [gradients(t)["layers"][name][i] for t in (1, 2, 3)]
            expected = adafactor_by_hand(start["layers"][name][i], g, 0.05, 0.1, factored)
            np.testing.assert_allclose(got["layers"][name][i], expected, rtol=2e-5, atol=1e-6)
    expected = adafactor_by_hand(start["embed"], [gradients(t)["embed"] for t in (1, 2, 3)], 0.05, 0.1, False)
    np.testing.assert_allclose(got["embed"], expected, rtol=2e-5, atol=1e-6)


def test_adafactor_keeps_rows_and_columns_alone():
    params = {"up": jnp.zeros((2, 128, 160))}
    assert sum(x.size for x in jax.tree.leaves(optimizers.adafactor(0.1).init(params))) < 2 * (128 + 160) + 10


def lion_by_hand(p, gradients, rate, decay):
    m = 0
    for g in gradients:
        p, m = p - rate * (np.sign(0.9 * m + 0.1 * g) + decay * p), 0.99 * m + 0.01 * g
    return p


def sgd_by_hand(p, gradients, rate, decay):
    m = 0
    for g in gradients:
        m = 0.8 * m + g
        p = p - rate * (m + decay * p)
    return p


@pytest.mark.parametrize(
    ("optimizer", "by_hand"),
    [
        (functools.partial(optimizers.lion, 0.1), lion_by_hand),
        (functools.partial(optimizers.sgd, 0.1, momentum=0.8), sgd_by_hand),
    ],
)
def test_lion_and_sgd_are_those_of_the_equations(optimizer, by_hand):
    got = three_steps(optimizer(weight_decay=0.3, clip=1e9), TREE, gradients)
    for (path, p), decay in zip(jax.tree.leaves_with_path(TREE), (0.3, 0, 0.3, 0)):
        of = lambda tree, path=path: functools.reduce(lambda tree, entry: tree[entry.key], path, tree)
        np.testing.assert_allclose(of(got), by_hand(p, [of(gradients(t)) for t in (1, 2, 3)], 0.1, decay), rtol=1e-5)


def test_without_momentum_there_is_no_state_of_it():
    assert sum(x.size for x in jax.tree.leaves(optimizers.sgd(0.1).init(PARAMS))) == 0


EVERY = {
    "adamw": optimizers.adamw, "adafactor": optimizers.adafactor, "lion": optimizers.lion, "muon": optimizers.muon,
    "sgd": optimizers.sgd,
}  # fmt: skip


@pytest.mark.parametrize("optimizer", EVERY.values(), ids=EVERY)
def test_every_option_has_an_effect(optimizer):
    """On the parameters after three steps, with a clip that bites."""
    other = {
        "b1": 0.5, "b2": 0.5, "eps": 0.1, "weight_decay": 0.3, "clip": 0.5, "momentum": 0.5, "rms": 0.1,
        "decay_rate": 0.3, "threshold": 0.5, "decayed": optimizers.all_but("embed"),
    }  # fmt: skip
    names = [name for name, p in inspect.signature(optimizer).parameters.items() if p.kind is p.KEYWORD_ONLY]
    base = {"weight_decay": 0.1, "clip": 1.0}
    of_all_sizes = lambda t: few_slopes(t, 10.0 ** (2 * t - 4))
    run = lambda **options: jax.tree.leaves(three_steps(optimizer(0.02, **base | options), FEW, of_all_sizes))
    default = run()
    for name in names:
        pairs = zip(default, run(**{name: other[name]}))
        assert any((np.asarray(a) != np.asarray(b)).any() for a, b in pairs), f"{name} has no effect"


FEW = {"embed": PARAMS["embed"], "layers": {name: PARAMS["layers"][name] for name in ("attn_norm", "up")}}


def few_slopes(t, size=1.0):
    return jax.tree.map(lambda x: size * np.random.default_rng(t).normal(size=x.shape), FEW)


@pytest.mark.parametrize("optimizer", EVERY.values(), ids=EVERY)
def test_a_schedule_serves_as_the_rate(optimizer):
    """Updates under a rate that falls are smaller than under one that stays, which is the number itself."""
    moved = lambda rate: [
        np.abs(np.asarray(a) - b).mean()
        for a, b in zip(*map(jax.tree.leaves, (three_steps(optimizer(rate), FEW, few_slopes), FEW)))
    ]
    falls, stays = moved(schedules.linear(0.01, 3)), moved(schedules.constant(0.01, 3))
    assert all(0.3 * b < a < 0.95 * b for a, b in zip(falls, stays))
    np.testing.assert_allclose(stays, moved(0.01), rtol=1e-5)


@pytest.mark.parametrize("optimizer", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, r"learning_rate must be above 0, got 0.0"),
        ({"rate": float("nan")}, r"learning_rate must be above 0, got nan"),
        ({"clip": 0.0}, r"clip must be above 0, got 0.0"),
        ({"weight_decay": -0.1}, r"weight_decay must be in \[0.0, inf\), got -0.1"),
        *(
            ({name: 1.0}, rf"{name} must be in \[0.0, 1.0\), got 1.0")
            for name in ("b1", "b2", "momentum", "decay_rate")
        ),
        *(({name: 0.0}, rf"{name} must be above 0, got 0.0") for name in ("rms", "threshold")),
    ],
)
def test_a_number_out_of_range_is_refused(optimizer, options, message):
    if options.keys() <= inspect.signature(optimizer).parameters.keys():
        with pytest.raises(ValueError, match=message):
            optimizer(**{"rate": 0.1} | options)


SPREAD = {"8 bits": lambda rate, **options: moments.in_8_bits(optimizers.adamw(rate, **options), least=64)} | EVERY


@pytest.mark.parametrize("optimizer", SPREAD.values(), ids=SPREAD)
def test_eight_devices_take_the_steps_of_one(optimizer):
    """With parameters and moments split over three axes of a mesh: matrices, their norms and draws are not local."""
    shapes = {"embed": (8, 4), "layers": {"wq": (2, 4, 2, 6), "down": (2, 8, 4), "attn_norm": (2, 4)}}
    is_shape = lambda s: isinstance(s, tuple)
    fresh = lambda t: jax.tree.map(
        lambda s: np.float32(np.random.default_rng(t).normal(size=s)), shapes, is_leaf=is_shape
    )
    optimizer, mesh = optimizer(0.05, weight_decay=0.1, clip=0.5), sharding.make_mesh(2, 2, 2)

    def three(params, place, layout):
        state = place(optimizer.init(params))
        step = jit(lambda grads, state, params: optimizer.update(grads, state, params), out_shardings=layout(state))
        for t in (1, 2, 3):
            updates, state = step(place(fresh(t)), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    one = three(fresh(0), lambda tree: tree, lambda state: None)
    layout = lambda tree: sharding.by_name(tree, mesh)
    params = jax.device_put(fresh(0), layout(fresh(0)))
    eight = three(
        params, lambda tree: jax.device_put(tree, layout(tree)), lambda state: (layout(params), layout(state))
    )
    assert len(eight[0]["layers"]["wq"].sharding.device_set) == 8
    assert not eight[0]["layers"]["wq"].is_fully_replicated
    close = lambda a, b: np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-4, atol=1e-6)
    jax.tree.map(close, eight, one)


# ---- by path


def test_what_is_decayed_can_be_said_by_path():
    optimizer = optimizers.adamw(0.1, weight_decay=0.5, decayed=optimizers.all_but("embed", "layers.*norm"))
    params = jax.tree.map(jnp.ones_like, TREE)
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(still, optimizer.init(params), params)
    moved = {
        jax.tree_util.keystr(path, simple=True, separator=".") for path, u in jax.tree.leaves_with_path(updates)
        if (u != 0).any()
    }  # fmt: skip
    assert moved == {"norm", "layers.wq"}


def test_rates_by_path_are_those_of_optimisers_of_their_own():
    """With the decay, which goes with the rate; the first pattern that matches counts."""
    tree = lora.init(
        jax.random.key(0), jax.tree.map(jnp.float32, PARAMS), lora.Adapter(rank=2, alpha=4.0, targets=("wq", "wk"))
    )
    gradients = lambda t: jax.tree.map(lambda x: np.random.default_rng(t).normal(size=x.shape), tree)
    of = lambda rate: optimizers.adamw(rate, weight_decay=0.2, clip=1e9)
    factors = optimizers.scale_by_path({"layers.wk.*": 0.0, "*.b": 16.0})
    got = three_steps(optax.chain(of(0.01), factors), tree, gradients)
    slow, fast = three_steps(of(0.01), tree, gradients), three_steps(of(0.16), tree, gradients)
    for name, adapter in got["layers"].items():
        if name == "wk":
            jax.tree.map(np.testing.assert_array_equal, adapter, tree["layers"]["wk"])
        else:
            np.testing.assert_array_equal(adapter["a"], slow["layers"][name]["a"])
            np.testing.assert_allclose(adapter["b"], fast["layers"][name]["b"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "make",
    [lambda p: optimizers.scale_by_path({p: 2.0}), lambda p: optimizers.adamw(1.0, decayed=optimizers.all_but(p))],
)
def test_a_pattern_that_matches_nothing_is_refused(make):
    with pytest.raises(
        ValueError, match=r"'\*\.c' matches none of the parameters: embed, layers.attn_norm, layers.wq, norm"
    ):
        make("*.c").init(TREE)


def test_a_negative_factor_is_refused():
    with pytest.raises(ValueError, match=r"the factor of '\*.b' must be in \[0.0, inf\), got -1.0"):
        optimizers.scale_by_path({"*.b": -1.0})


# ---- several trees


def both(params, frozen, batch, key):
    policy = jnp.square(batch["x"] @ params["policy"]["w"] - 1).mean()
    return policy + 100 * jnp.square(batch["x"] @ params["value"]["w"] - 2).mean(), {}


def alone(name, factor, target):
    return lambda params, frozen, batch, key: (factor * jnp.square(batch["x"] @ params["w"] - target).mean(), {})


def test_several_trees_train_as_each_would_alone():
    """The clip of one knows nothing of the gradient of the other, which is a hundred times as large."""
    start = {"policy": {"w": jnp.ones(3)}, "value": {"w": jnp.full(3, 0.5)}}
    of = {"policy": optimizers.adamw(0.1, clip=0.5, weight_decay=0.1), "value": optimizers.muon(0.03, clip=0.3)}
    step = make_train_step(both, optimizers.each(**of))
    state = init_state(start, optimizers.each(**of), jax.random.key(0))
    loss = {"policy": alone("policy", 1, 1), "value": alone("value", 100, 2)}
    steps = {name: make_train_step(loss[name], of[name]) for name in of}
    states = {name: init_state(start[name], of[name], jax.random.key(0)) for name in of}
    for i in range(4):
        batch = {"x": np.random.default_rng(i).normal(size=(4, 3)).astype(np.float32)}
        state, _ = step(state, None, batch)
        for name in of:
            states[name], _ = steps[name](states[name], None, batch)
    for name in of:
        np.testing.assert_allclose(state.params[name]["w"], states[name].params["w"], rtol=1e-6)
        assert jax.tree.structure(state.opt_state[name]) == jax.tree.structure(states[name].opt_state)


@pytest.mark.parametrize("params", [{"policy": 1.0}, {"policy": 1.0, "values": 1.0}, [1.0, 2.0]])
def test_trees_without_an_optimiser_are_refused(params):
    with pytest.raises(ValueError, match=r"params are .*; there are optimisers for \['policy', 'value'\]"):
        optimizers.each(policy=optimizers.sgd(0.1), value=optimizers.sgd(0.1)).init(jax.tree.map(jnp.float32, params))
