"""The laws that every loss, objective, divergence and advantage keeps, whoever wrote it and whenever.

Nothing is listed here: the public functions are found, and their arguments are made from the names in their
signatures; ``law_arguments`` says what a name stands for. A function with a ``mask`` speaks of tokens, ``[B, T]``, one
with [P, G] rewards of groups, any other of rows, ``[B]``.
"""

import functools
import importlib
import inspect
import pkgutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from law_arguments import (
    EITHER,
    NAN_OF_INFINITIES,
    NATS,
    OTHER,
    WHOLE_BATCH,
    arguments,
    axes,
    of_groups,
    positional,
    real_slots,
)

from pt_jax import advantages, divergences, logps, losses, objectives, weights

# ---- what is on trial


def public_functions(*rooms):
    modules = list(rooms)
    for room in rooms:
        if hasattr(room, "__path__"):
            found = pkgutil.walk_packages(room.__path__, f"{room.__name__}.")
            modules += [importlib.import_module(module.name) for module in found]
    return {
        f"{module.__name__.removeprefix('pt_jax.')}.{name}": fn
        for module in modules
        for name, fn in inspect.getmembers(module, inspect.isfunction)
        if not name.startswith("_") and fn.__module__ == module.__name__
    }


FUNCTIONS = public_functions(losses, objectives, divergences, advantages)
DOCUMENTED = FUNCTIONS | public_functions(logps, weights)


def every(functions):
    return pytest.mark.parametrize("fn", functions.values(), ids=functions.keys())


def speaks_of_tokens(fn):
    return "mask" in inspect.signature(fn).parameters


EVERY = every(FUNCTIONS)
EVERY_OF_TOKENS = every({name: fn for name, fn in FUNCTIONS.items() if speaks_of_tokens(fn)})
EVERY_OF_SINGLE_ROWS = every({name: fn for name, fn in FUNCTIONS.items() if name not in WHOLE_BATCH})


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


def law_of_microbatches(fn, parts):
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


def law_of_padding(fn):
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


def law_of_masked_slots(fn, rubbish):
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


def law_of_unscored_results(fn):
    """A result a token is 0 where nothing is scored, whatever came in there: a plain sum is right as well."""
    kwargs, mask = arguments(fn)
    for name, x in floats(fn, kwargs).items():
        if "T" in axes(fn, name):
            kwargs[name] = np.where(real_slots(mask, axes(fn, name)), x, np.float32(np.nan))
    for result in jax.tree.leaves(fn(**kwargs)):
        if result.shape == mask.shape:
            assert (np.asarray(result)[~mask] == 0).all()


def law_of_traced_hyperparameters(fn):
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


def law_of_options_with_an_effect(fn):
    """13: a hyperparameter that changes no result is a promise that nobody keeps."""
    batches = [arguments(fn, seed)[0] for seed in range(4)]
    default = [jax.tree.leaves(fn(**kwargs)) for kwargs in batches]
    for name, x in hyperparameters(fn).items():
        other = [jax.tree.leaves(fn(**kwargs, **{name: OTHER.get(name, 0.1 * x + 0.01)})) for kwargs in batches]
        pairs = zip(jax.tree.leaves(default), jax.tree.leaves(other))
        assert any((np.asarray(a) != np.asarray(b)).any() for a, b in pairs), f"{name} has no effect"


def law_of_vmap(fn):
    batches = [arguments(fn, seed)[0] for seed in range(3)]
    stacked = {name: np.stack([kwargs[name] for kwargs in batches]) for name in batches[0]}
    got = jax.tree.leaves(jax.vmap(lambda kwargs: fn(**kwargs))(stacked))
    for i, kwargs in enumerate(batches):
        for mapped, alone in zip(got, jax.tree.leaves(fn(**kwargs))):
            np.testing.assert_allclose(mapped[i], alone, rtol=1e-5, atol=1e-6)


def law_of_devices(fn):
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


def law_of_second_derivatives(fn):
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


def law_of_bad_input(fn):
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


def law_of_float32(fn):
    """12: float32 in, float32 out; nothing is left in the width of a comparison or of a constant."""
    kwargs, _ = arguments(fn)
    for result in jax.tree.leaves(fn(**kwargs)):
        assert result.dtype == jnp.float32


def law_of_signatures(fn):
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


@EVERY
def test_the_signature_has_arrays_and_numbers_and_no_switches(fn):
    law_of_signatures(fn)


@every(DOCUMENTED)
def test_the_docstring_says_what_it_is_and_shows_it(fn):
    doc = inspect.getdoc(fn) or ""
    first = doc.split("\n")[0].strip()
    assert first.endswith((".", ":")) or "." in first, "no first sentence"
    assert ">>> " in doc, "no example"


@EVERY
def test_the_docstring_gives_an_equation_arguments_and_a_source(fn):
    """Of the function, or of the one whose arguments it says it has; a family may give its source in the module."""
    doc = inspect.getdoc(fn)
    module = inspect.getdoc(inspect.getmodule(fn)) or ""
    assert any(sign in doc for sign in (" = ", "sum_", "log ", "^2")), "no equation"
    assert "http" in doc + module, "no source"
    for name in positional(fn):
        assert f"{name}:" in doc or f"{name}," in doc or "``" in doc, f"{name} is not documented"


@EVERY_OF_SINGLE_ROWS
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_microbatches_change_nothing(fn, parts):
    law_of_microbatches(fn, parts)


@EVERY
def test_padding_changes_nothing(fn):
    law_of_padding(fn)


@EVERY
def test_eight_devices_change_nothing(fn):
    law_of_devices(fn)


@EVERY_OF_TOKENS
@pytest.mark.parametrize("rubbish", [np.nan, 1e9, -1e9, np.inf])
def test_masked_slots_do_not_exist(fn, rubbish):
    law_of_masked_slots(fn, rubbish)


@EVERY_OF_TOKENS
def test_what_is_not_scored_is_zero(fn):
    law_of_unscored_results(fn)


@EVERY
def test_hyperparameters_may_be_traced(fn):
    law_of_traced_hyperparameters(fn)


@EVERY
def test_every_hyperparameter_has_an_effect(fn):
    law_of_options_with_an_effect(fn)


@EVERY
def test_it_can_be_vmapped(fn):
    law_of_vmap(fn)


@EVERY
def test_it_can_be_differentiated_twice(fn):
    law_of_second_derivatives(fn)


@EVERY
def test_float32_in_is_float32_out(fn):
    law_of_float32(fn)


@EVERY
def test_bad_input_is_refused_by_name(fn):
    law_of_bad_input(fn)


@EVERY_OF_TOKENS
def test_a_token_of_probability_0_in_both_policies_makes_no_nan(fn):
    """It comes up in training: an update moves a token out of the top k that it was sampled from."""
    kwargs, mask = arguments(fn)
    row, column = np.argwhere(mask)[5]
    nats = [name for name in kwargs if name in EITHER]
    if len(nats) < 2 or name_of(fn) in NAN_OF_INFINITIES:
        pytest.skip("speaks of one policy")
    for name in nats:
        kwargs[name] = kwargs[name].copy()
        kwargs[name][row, column] = -np.inf
    w = next(iter(rules(fn).values()))(mask)
    value, gradients = value_and_gradients(fn, kwargs, w)
    assert not np.isnan(value).any()
    for name, g in gradients.items():
        assert not np.isnan(g).any(), name


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    @parameterized.named_parameters(*FUNCTIONS.items())
    def test_jit_and_device_change_nothing(self, fn):
        kwargs, _ = arguments(fn)
        expected = fn(**kwargs)
        chex.assert_trees_all_close(self.variant(fn)(**kwargs), expected, rtol=1e-5, atol=1e-6)


# ---- the laws themselves: each must catch the mistake that it is there for


def test_the_functions_are_found():
    found = {name.rsplit(".", 1)[1] for name in FUNCTIONS}
    assert {"nll", "dpo", "implicit_reward", "clipped_surrogate", "clip_indicators", "k1", "k2", "k3"} <= found
    assert not any(name.startswith("_") or name == "zero_unscored" for name in found)


def mean_within_the_part(logps, mask):
    return -jnp.where(mask, logps, 0) / jnp.maximum(mask.sum(), 1)


def centred_over_the_rows(chosen, rejected):
    margin = chosen - rejected
    return margin - margin.mean()


def blocked_by_position(logps, mask):
    return jnp.where(mask, logps, 0) * jnp.arange(mask.shape[1])[None]


def multiplied_by_the_mask(logps, mask):
    return -logps * mask.astype(logps.dtype)  # jnp.multiply by booleans selects; by numbers it does not


def poisoned_in_the_gradient_alone(logps, mask):
    return jnp.where(mask, jnp.square(logps), 0)


def cancelling(logps, ref_logps, mask):
    return jnp.where(mask, logps - ref_logps, 0) + 0 * (logps - ref_logps).sum(keepdims=True)


def one_where_not_scored(logps, mask):
    return jnp.where(mask, jnp.exp(logps), 1)


def asks_for_its_number(logps, mask, *, beta=0.1):
    return jnp.where(mask, logps, 0) * (beta if beta > 0 else 1)


def ignores_its_number(logps, mask, *, beta=0.1):
    return jnp.where(mask, logps, 0)


def sorts_on_the_host(chosen, rejected):
    return jnp.asarray(np.asarray(chosen) - np.asarray(rejected))


def counts(logps, mask):
    return mask & (logps > -2)


def with_a_switch(logps, mask, *, normalise=True):
    return logps


def with_a_mode(logps, mask, *, level="token"):
    return logps


def without_a_default(logps, mask, *, beta):
    return logps


def of_something_else(logps, mask, teacher_temperature):
    return logps


@pytest.mark.parametrize(
    ("law", "culprit"),
    [
        (functools.partial(law_of_microbatches, parts=2), mean_within_the_part),
        (functools.partial(law_of_microbatches, parts=4), centred_over_the_rows),
        (law_of_padding, blocked_by_position),
        (law_of_padding, centred_over_the_rows),
        (functools.partial(law_of_masked_slots, rubbish=np.nan), poisoned_in_the_gradient_alone),
        (functools.partial(law_of_masked_slots, rubbish=np.inf), cancelling),
        (law_of_unscored_results, multiplied_by_the_mask),
        (law_of_unscored_results, one_where_not_scored),
        (law_of_traced_hyperparameters, asks_for_its_number),
        (law_of_options_with_an_effect, ignores_its_number),
        (law_of_vmap, sorts_on_the_host),
        (law_of_float32, counts),
        (law_of_signatures, with_a_switch),
        (law_of_signatures, with_a_mode),
        (law_of_signatures, without_a_default),
        (law_of_signatures, of_something_else),
    ],
    ids=lambda x: getattr(x, "__name__", "") or x.func.__name__,
)
def test_the_law_catches(law, culprit):
    with pytest.raises((AssertionError, jax.errors.JAXTypeError, pytest.fail.Exception)):
        law(culprit)
