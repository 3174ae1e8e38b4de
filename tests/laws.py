"""The laws of the mathematics as functions of a loss, objective, divergence or advantage: each fails for who breaks it.

A function with a ``mask`` speaks of tokens, ``[B, T]``, one with [P, G] rewards of groups, any other of rows, ``[B]``;
``law_arguments`` makes the arguments from the names in a signature.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from law_arguments import NATS, OTHER, WHOLE_BATCH, arguments, axes, of_groups, real_slots

from pt_jax import weights


def speaks_of_tokens(fn):
    return "mask" in inspect.signature(fn).parameters


def name_of(fn):
    return f"{fn.__module__.removeprefix('pt_jax.')}.{fn.__name__}"


def hyperparameters(fn):
    """The numbers among the keyword-only parameters with their defaults; a callable may be one as well."""
    return {
        name: p.default
        for name, p in inspect.signature(fn).parameters.items()
        if p.kind is inspect.Parameter.KEYWORD_ONLY and not callable(p.default)
    }


# ---- what is compared

RULES_OF_TOKENS = {
    "token_mean": weights.token_mean,
    "sequence_mean": weights.sequence_mean,
    "constant_length": functools.partial(weights.constant_length, length=9),
}


def rules(fn):
    """Ways to weigh the results: for a result with two axes and for one with one axis, from the mask."""
    of_tokens = RULES_OF_TOKENS if speaks_of_tokens(fn) else {"each": weights.token_mean}
    return {
        name: lambda mask, rule=rule: {2: rule(mask), 1: weights.row_mean(mask.any(-1))}
        for name, rule in of_tokens.items()
    }


def floats(fn, kwargs):
    """What is differentiated: log-probabilities, logits, values; not lengths, labels and rewards of groups."""
    of_groups = lambda name: not {"P", "F"}.isdisjoint(axes(fn, name).split())
    return {name: x for name, x in kwargs.items() if x.dtype == np.float32 and not of_groups(name)}


def of_the_batch(fn, name):
    """Whether an argument has an entry a row of the batch; numbers, and weights of reward functions, have none."""
    return axes(fn, name)[:1] in ("B", "P")


def weighed(fn, results, w):
    """The weighted sum of each result; what is a number for the whole batch, as it is."""
    alone = name_of(fn) in WHOLE_BATCH
    results = [x for x in jax.tree.leaves(results) if x.ndim or alone]
    return [weights.weighted_sum(x, w[x.ndim]) if x.ndim else x for x in results]


@functools.cache
def measure(fn):
    """``(floats, rest, w) -> (weighted sums of fn's results, their gradients)``, compiled once a shape."""

    def sums(floats, rest, w):
        return jnp.stack(weighed(fn, fn(**floats, **rest), w))

    def measured(floats, rest, w):
        if not floats:
            return sums(floats, rest, w), {}
        return sums(floats, rest, w), jax.jacrev(sums)(floats, rest, w)

    return jax.jit(measured)


def value_and_gradients(fn, kwargs, w):
    of = floats(fn, kwargs)
    value, gradients = measure(fn)(of, {k: v for k, v in kwargs.items() if k not in of}, jax.tree.map(np.asarray, w))
    return np.asarray(value), jax.tree.map(np.asarray, gradients)


def assert_same(got, expected):
    """To the rounding of float32."""
    (value, gradients), (expected_value, expected_gradients) = got, expected
    np.testing.assert_allclose(value, expected_value, rtol=1e-5, atol=1e-6)
    for name in expected_gradients:
        np.testing.assert_allclose(
            gradients[name], expected_gradients[name], rtol=1e-5, atol=1e-7, err_msg=f"gradient in {name}"
        )


# ---- the laws


def microbatches(fn, parts):
    """2: the weights are made over the whole batch; after that, parts of it just add."""
    kwargs, mask = arguments(fn)
    deal = lambda x: np.asarray(x).reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
    share = lambda x: np.stack([x] * parts)
    for rule in rules(fn).values():
        w = rule(mask)
        dealt = {name: deal(x) if of_the_batch(fn, name) else share(x) for name, x in kwargs.items()}
        dealt_w = jax.tree.map(deal, w)
        measured = [
            value_and_gradients(fn, {k: x[i] for k, x in dealt.items()}, {n: x[i] for n, x in dealt_w.items()})
            for i in range(parts)
        ]
        value = sum(v for v, _ in measured)

        def undeal(*x):
            """[M, results, B / M, ...] back to [results, B, ...]: row i was dealt to part i % M; a scalar's add."""
            if x[0].ndim == 1:
                return sum(x)
            return np.stack(x, 2).reshape(len(x[0]), -1, *x[0].shape[2:])

        gradients = jax.tree.map(undeal, *[g for _, g in measured])
        assert_same((value, gradients), value_and_gradients(fn, kwargs, w))


def padding(fn):
    """2: columns and rows that only fill up change nothing, whatever is in them."""
    kwargs, mask = arguments(fn)
    rows = (0, 0) if WHOLE_BATCH.get(name_of(fn)) else (1, 3)
    widths = {"B": rows, "P": rows, "T": (2, 1), "G": (2, 1), "V": (0, 0), "F": (0, 0)}

    def pad(x, letters):
        fill = False if x.dtype == bool else np.nan if letters.startswith("P G") else 7.7
        return np.pad(x, [widths[axis] for axis in letters.split()], constant_values=fill) if letters else x

    def inside(letters):
        return tuple(slice(widths[axis][0], -widths[axis][1] or None) for axis in letters.split())

    filled = {name: pad(x, axes(fn, name)) for name, x in kwargs.items()}
    filled_mask = pad(mask, "P G" if of_groups(fn) else "B T")
    for rule in rules(fn).values():
        value, gradients = value_and_gradients(fn, filled, rule(filled_mask))
        for name, g in gradients.items():
            exists = real_slots(filled_mask, axes(fn, name))
            assert exists is None or axes(fn, name) == "B" or (g[:, ~exists] == 0).all()
        gradients = {name: g[(slice(None), *inside(axes(fn, name)))] for name, g in gradients.items()}
        assert_same((value, gradients), value_and_gradients(fn, kwargs, rule(mask)))


def masked_slots(fn, rubbish):
    """4: they do not exist. One argument at a time as well: two NaNs may hide each other, two 1e9 cancel."""
    kwargs, mask = arguments(fn)
    w = rules(fn)["sequence_mean"](mask)
    expected_value, expected = value_and_gradients(fn, kwargs, w)
    of_tokens = {name: real_slots(mask, axes(fn, name)) for name in floats(fn, kwargs) if "T" in axes(fn, name)}
    poisoned = {name: np.where(exists, kwargs[name], np.float32(rubbish)) for name, exists in of_tokens.items()}
    for some in [*({name: x} for name, x in poisoned.items()), poisoned]:
        value, gradients = value_and_gradients(fn, kwargs | some, w)
        np.testing.assert_array_equal(value, expected_value)
        for name, g in gradients.items():
            np.testing.assert_array_equal(g, expected[name], err_msg=f"gradient in {name}, {rubbish} in {[*some]}")
            assert name not in of_tokens or (g[:, ~of_tokens[name]] == 0).all()


def unscored_results(fn):
    """A result a token is 0 where nothing is scored, whatever came in there: a plain sum is right as well."""
    kwargs, mask = arguments(fn)
    for name, x in floats(fn, kwargs).items():
        if "T" in axes(fn, name):
            kwargs[name] = np.where(real_slots(mask, axes(fn, name)), x, np.float32(np.nan))
    for result in jax.tree.leaves(fn(**kwargs)):
        if result.shape == mask.shape:
            assert (np.asarray(result)[~mask] == 0).all()


def traced_hyperparameters(fn):
    """One compiled program serves a sweep: a number may be traced, and vmapped over."""
    kwargs, _ = arguments(fn)
    numbers = {name: np.float32(x) for name, x in hyperparameters(fn).items()}
    call = lambda numbers: jax.tree.leaves(fn(**kwargs, **numbers))
    for expected, got in zip(call({}), jax.jit(call)(numbers)):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    if numbers:
        two = jax.vmap(call)({name: np.stack([x, x]) for name, x in numbers.items()})
        for expected, got in zip(call({}), two):
            np.testing.assert_allclose(got, np.stack([expected, expected]), rtol=1e-5, atol=1e-6)


def options_with_an_effect(fn):
    """13: a hyperparameter that changes no result is a promise that nobody keeps."""
    batches = [arguments(fn, seed)[0] for seed in range(4)]
    default = [jax.tree.leaves(fn(**kwargs)) for kwargs in batches]
    for name, x in hyperparameters(fn).items():
        other = [jax.tree.leaves(fn(**kwargs, **{name: OTHER.get(name, 0.1 * x + 0.01)})) for kwargs in batches]
        pairs = zip(jax.tree.leaves(default), jax.tree.leaves(other))
        assert any((np.asarray(a) != np.asarray(b)).any() for a, b in pairs), f"{name} has no effect"


def vmap(fn):
    batches = [arguments(fn, seed)[0] for seed in range(3)]
    stacked = {name: np.stack([kwargs[name] for kwargs in batches]) for name in batches[0]}
    got = jax.tree.leaves(jax.vmap(lambda kwargs: fn(**kwargs))(stacked))
    for i, kwargs in enumerate(batches):
        for mapped, alone in zip(got, jax.tree.leaves(fn(**kwargs))):
            np.testing.assert_allclose(mapped[i], alone, rtol=1e-5, atol=1e-6)


def devices(fn):
    """2: spread over eight devices it is the same number."""
    kwargs, mask = arguments(fn)
    w = jax.tree.map(np.asarray, next(iter(rules(fn).values()))(mask))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    put = lambda x, spread=True: jax.device_put(x, sharding("data") if spread else sharding())
    spread, of = {name: put(x, of_the_batch(fn, name)) for name, x in kwargs.items()}, floats(fn, kwargs)
    got = measure(fn)(
        {k: v for k, v in spread.items() if k in of}, {k: v for k, v in spread.items() if k not in of},
        jax.tree.map(put, w),
    )  # fmt: skip
    assert_same(jax.tree.map(np.asarray, got), value_and_gradients(fn, kwargs, w))


def second_derivatives(fn):
    """Twice differentiable, with finite numbers, also where slots are masked."""
    kwargs, mask = arguments(fn)
    w, of = next(iter(rules(fn).values()))(mask), floats(fn, kwargs)
    for name, exists in ((name, real_slots(mask, axes(fn, name))) for name in of):
        if "T" in axes(fn, name):
            kwargs[name] = np.where(exists, kwargs[name], np.float32(np.nan))
    rest = {k: v for k, v in kwargs.items() if k not in of}

    def total(of):
        return sum(weighed(fn, fn(**of, **rest), w))

    of = {k: jnp.asarray(kwargs[k]) for k in of}
    _, curvature = jax.jvp(jax.grad(total), (of,), (jax.tree.map(jnp.ones_like, of),))
    for name, c in curvature.items():
        assert np.isfinite(c).all(), name


def bad_input(fn):
    """14: another shape, whole numbers and numbers out of range are refused, each by its name."""
    kwargs, _ = arguments(fn)
    for name, x in kwargs.items():
        wrong = np.zeros((*x.shape, 2), x.dtype)
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            fn(**kwargs | {name: wrong})
        # lengths, labels and masks may be whole numbers; nats, logits, values and rewards may not
        if axes(fn, name) == "B T V" or name in NATS:
            with pytest.raises(ValueError, match=rf"\b{name}\b"):
                fn(**kwargs | {name: np.ones(x.shape, np.int32)})
    for name in hyperparameters(fn):
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            fn(**kwargs, **{name: float("nan")})


def float32(fn):
    """12: float32 in, float32 out; nothing is left in the width of a comparison or of a constant."""
    kwargs, _ = arguments(fn)
    for result in jax.tree.leaves(fn(**kwargs)):
        assert result.dtype == jnp.float32


def signatures(fn):
    """Arrays by their names, then keyword-only numbers with the paper's default; a variant is another function, so
    there are no switches."""
    arguments(fn)  # fails for a name that is not known
    for name, p in inspect.signature(fn).parameters.items():
        assert p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY), f"{name} is of a kind that cannot be named"
        assert not isinstance(p.default, bool | str), f"{name} is a switch"
        assert p.annotation not in (bool, str, "bool", "str"), f"{name} is a switch"
        if p.kind is p.KEYWORD_ONLY:
            assert p.default is not p.empty, f"{name} has no default"
            assert callable(p.default) or isinstance(p.default, int | float), f"{name} is no number"
