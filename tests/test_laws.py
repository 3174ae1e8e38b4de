"""The laws that every loss, objective, divergence and advantage keeps, whoever wrote it and whenever.

Nothing is listed here: the public functions are found, and their arguments are made from the names in their
signatures. ``laws`` says what is asked of each, and ``test_lawbreakers`` that each question finds its culprit.
"""

import importlib
import inspect
import pkgutil

import chex
import laws
import numpy as np
import pytest
from absl.testing import parameterized
from law_arguments import EITHER, NAN_OF_INFINITIES, WHOLE_BATCH, arguments, positional

from pt_jax import advantages, divergences, logps, losses, objectives, weights


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


EVERY = every(FUNCTIONS)
EVERY_OF_TOKENS = every({name: fn for name, fn in FUNCTIONS.items() if laws.speaks_of_tokens(fn)})
EVERY_OF_SINGLE_ROWS = every({name: fn for name, fn in FUNCTIONS.items() if name not in WHOLE_BATCH})


def test_the_functions_are_found():
    found = {name.rsplit(".", 1)[1] for name in FUNCTIONS}
    assert {"nll", "dpo", "implicit_reward", "clipped_surrogate", "clip_indicators", "k1", "k2", "k3"} <= found
    assert not any(name.startswith("_") or name == "zero_unscored" for name in found)


@EVERY
def test_the_signature_has_arrays_and_numbers_and_no_switches(fn):
    laws.signatures(fn)


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
    laws.microbatches(fn, parts)


@EVERY
def test_padding_changes_nothing(fn):
    laws.padding(fn)


@EVERY
def test_eight_devices_change_nothing(fn):
    laws.devices(fn)


@EVERY_OF_TOKENS
@pytest.mark.parametrize("rubbish", [np.nan, 1e9, -1e9, np.inf])
def test_masked_slots_do_not_exist(fn, rubbish):
    laws.masked_slots(fn, rubbish)


@EVERY_OF_TOKENS
def test_what_is_not_scored_is_zero(fn):
    laws.unscored_results(fn)


@EVERY
def test_hyperparameters_may_be_traced(fn):
    laws.traced_hyperparameters(fn)


@EVERY
def test_every_hyperparameter_has_an_effect(fn):
    laws.options_with_an_effect(fn)


@EVERY
def test_it_can_be_vmapped(fn):
    laws.vmap(fn)


@EVERY
def test_it_can_be_differentiated_twice(fn):
    laws.second_derivatives(fn)


@EVERY
def test_float32_in_is_float32_out(fn):
    laws.float32(fn)


@EVERY
def test_bad_input_is_refused_by_name(fn):
    laws.bad_input(fn)


@EVERY_OF_TOKENS
def test_a_token_of_probability_0_in_both_policies_makes_no_nan(fn):
    """It comes up in training: an update moves a token out of the top k that it was sampled from."""
    kwargs, mask = arguments(fn)
    row, column = np.argwhere(mask)[5]
    nats = [name for name in kwargs if name in EITHER]
    if len(nats) < 2 or laws.name_of(fn) in NAN_OF_INFINITIES:
        pytest.skip("speaks of one policy")
    for name in nats:
        kwargs[name] = kwargs[name].copy()
        kwargs[name][row, column] = -np.inf
    w = next(iter(laws.rules(fn).values()))(mask)
    value, gradients = laws.value_and_gradients(fn, kwargs, w)
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
