"""The laws that every loss, objective and divergence keeps, whoever wrote it and whenever.

Nothing is listed here: the public functions are found, and their arguments are made from the names in their
signatures. A function with a ``mask`` speaks of tokens, ``[B, T]``; one without speaks of rows, ``[B]``. A name
that is not known fails with the request to say below what it stands for.
"""

import functools
import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax import divergences, losses, objectives, weights

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


FUNCTIONS = public_functions(losses, objectives, divergences)
EVERY = pytest.mark.parametrize("fn", FUNCTIONS.values(), ids=FUNCTIONS.keys())
SPEAKS_OF_TOKENS = {name: fn for name, fn in FUNCTIONS.items() if "mask" in inspect.signature(fn).parameters}
EVERY_OF_TOKENS = pytest.mark.parametrize("fn", SPEAKS_OF_TOKENS.values(), ids=SPEAKS_OF_TOKENS.keys())

# ---- arguments, by name

LENGTHS = np.array([6, 3, 0, 5, 1, 4, 6, 2])  # B = 8 rows, T = 6; one row is empty; no two halves are alike
COLUMNS = 6
LOGPS = {"logps", "old_logps", "ref_logps"}  # [B, T] nats, apart by ratios in [0.3, 3]; [B] sums without a mask
SUMS = {"chosen", "rejected", "ref_chosen", "ref_rejected"}  # [B] nats


def arguments(fn, seed=0):
    """Arrays for a function, and which slots of its result are real: ``(kwargs, real)``."""
    signature = inspect.signature(fn).parameters
    rng = np.random.default_rng(seed)
    mask = np.arange(COLUMNS) < np.roll(LENGTHS, seed)[:, None]
    mask[-2, 2] = False  # a hole: the answer of a tool
    of_tokens = "mask" in signature
    real = mask if of_tokens else mask.any(1)
    base = -rng.uniform(1.5, 6.0, real.shape)
    kwargs = {}
    for name in positional(fn):
        if name == "mask":
            kwargs[name] = mask
        elif name in LOGPS | SUMS:
            kwargs[name] = (base + rng.uniform(np.log(0.3), np.log(3), real.shape)).astype(np.float32)
        elif name == "advantages":
            kwargs[name] = rng.normal(size=real.shape).astype(np.float32)
        else:
            pytest.fail(f"{fn.__module__}.{fn.__name__}: say in {__name__} what {name!r} stands for")
    return kwargs, real


def positional(fn):
    parameters = inspect.signature(fn).parameters
    return [name for name, p in parameters.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY]


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
RULES_OF_ROWS = {"row_mean": weights.row_mean}


def rules(fn):
    return RULES_OF_TOKENS if "mask" in inspect.signature(fn).parameters else RULES_OF_ROWS


def floats(kwargs):
    return {name: x for name, x in kwargs.items() if x.dtype == np.float32}


@functools.cache
def measure(fn):
    """``(floats, rest, w) -> (weighted sums of fn's results, their gradients)``, compiled once a shape."""

    def sums(floats, rest, w):
        results = jax.tree.leaves(fn(**floats, **rest))
        return jnp.stack([weights.weighted_sum(x, w) for x in results])

    def measured(floats, rest, w):
        return sums(floats, rest, w), jax.jacrev(sums)(floats, rest, w)

    return jax.jit(measured)


def value_and_gradients(fn, kwargs, w):
    of = floats(kwargs)
    value, gradients = measure(fn)(of, {k: v for k, v in kwargs.items() if k not in of}, np.asarray(w))
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
    kwargs, real = arguments(fn)
    deal = lambda x: np.asarray(x).reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
    for rule in rules(fn).values():
        w = rule(real)
        dealt, dealt_w = {name: deal(x) for name, x in kwargs.items()}, deal(w)
        measured = [
            value_and_gradients(fn, {name: x[i] for name, x in dealt.items()}, dealt_w[i]) for i in range(parts)
        ]
        value = sum(v for v, _ in measured)
        # [M, results, B / M, ...] back to [results, B, ...]: row i was dealt to part i % M
        undeal = lambda *x: np.stack(x, 2).reshape(len(x[0]), -1, *x[0].shape[2:])
        gradients = jax.tree.map(undeal, *[g for _, g in measured])
        assert_same((value, gradients), value_and_gradients(fn, kwargs, w))


def law_of_padding(fn):
    """2: columns and rows that only fill up change nothing, whatever is in them."""
    kwargs, real = arguments(fn)
    widths = ((1, 3), (2, 1))[: real.ndim]
    inside = (slice(None), slice(1, -3), slice(2, -1))[: real.ndim + 1]
    pad = lambda x: np.pad(x, widths, constant_values=False if x.dtype == bool else -7.7)
    for rule in rules(fn).values():
        value, gradients = value_and_gradients(fn, {name: pad(x) for name, x in kwargs.items()}, rule(pad(real)))
        for g in gradients.values():
            assert (g[:, ~pad(real)] == 0).all()
        gradients = {name: g[inside] for name, g in gradients.items()}
        assert_same((value, gradients), value_and_gradients(fn, kwargs, rule(real)))


def law_of_masked_slots(fn, rubbish):
    """4: they do not exist. One argument at a time as well: two NaNs may hide each other, two 1e9 cancel."""
    kwargs, mask = arguments(fn)
    w = weights.sequence_mean(mask)
    expected_value, expected = value_and_gradients(fn, kwargs, w)
    poisoned = {name: np.where(mask, x, np.float32(rubbish)) for name, x in floats(kwargs).items()}
    for some in [*({name: x} for name, x in poisoned.items()), poisoned]:
        value, gradients = value_and_gradients(fn, kwargs | some, w)
        np.testing.assert_array_equal(value, expected_value)
        for name, g in gradients.items():
            np.testing.assert_array_equal(g, expected[name], err_msg=f"gradient in {name}, {rubbish} in {[*some]}")
            assert (g[:, ~mask] == 0).all()


def law_of_unscored_results(fn):
    """A result a token is 0 where nothing is scored, whatever came in there: a plain sum is right as well."""
    kwargs, mask = arguments(fn)
    kwargs |= {name: np.where(mask, x, np.float32(np.nan)) for name, x in floats(kwargs).items()}
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
    kwargs, _ = arguments(fn)
    default = jax.tree.leaves(fn(**kwargs))
    for name, x in hyperparameters(fn).items():
        other = jax.tree.leaves(fn(**kwargs, **{name: 0.1 * x + 0.01}))
        assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(default, other)), f"{name} has no effect"


def law_of_vmap(fn):
    batches = [arguments(fn, seed)[0] for seed in range(3)]
    stacked = {name: np.stack([kwargs[name] for kwargs in batches]) for name in batches[0]}
    got = jax.tree.leaves(jax.vmap(lambda kwargs: fn(**kwargs))(stacked))
    for i, kwargs in enumerate(batches):
        for mapped, alone in zip(got, jax.tree.leaves(fn(**kwargs))):
            np.testing.assert_allclose(mapped[i], alone, rtol=1e-5, atol=1e-6)


def law_of_devices(fn):
    """2: spread over eight devices it is the same number."""
    kwargs, real = arguments(fn)
    w = np.asarray(next(iter(rules(fn).values()))(real))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    spread = {name: jax.device_put(x, rows) for name, x in kwargs.items()}
    of = floats(spread)
    got = measure(fn)(of, {k: v for k, v in spread.items() if k not in of}, jax.device_put(w, rows))
    assert_same(jax.tree.map(np.asarray, got), value_and_gradients(fn, kwargs, w))


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


@EVERY
def test_the_docstring_says_what_it_is_and_shows_it(fn):
    doc = inspect.getdoc(fn) or ""
    assert doc.split("\n")[0].strip(), "no first line"
    assert ">>> " in doc, "no example"


@EVERY
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
def test_float32_in_is_float32_out(fn):
    law_of_float32(fn)


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
