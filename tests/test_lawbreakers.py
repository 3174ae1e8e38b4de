"""Each law catches the mistake that it is there for."""

import functools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest


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
        (functools.partial(laws.microbatches, parts=2), mean_within_the_part),
        (functools.partial(laws.microbatches, parts=4), centred_over_the_rows),
        (laws.padding, blocked_by_position),
        (laws.padding, centred_over_the_rows),
        (functools.partial(laws.masked_slots, rubbish=np.nan), poisoned_in_the_gradient_alone),
        (functools.partial(laws.masked_slots, rubbish=np.inf), cancelling),
        (laws.unscored_results, multiplied_by_the_mask),
        (laws.unscored_results, one_where_not_scored),
        (laws.traced_hyperparameters, asks_for_its_number),
        (laws.options_with_an_effect, ignores_its_number),
        (laws.vmap, sorts_on_the_host),
        (laws.float32, counts),
        (laws.signatures, with_a_switch),
        (laws.signatures, with_a_mode),
        (laws.signatures, without_a_default),
        (laws.signatures, of_something_else),
    ],
    ids=lambda x: getattr(x, "__name__", "") or x.func.__name__,
)
def test_the_law_catches(law, culprit):
    with pytest.raises((AssertionError, jax.errors.JAXTypeError, pytest.fail.Exception)):
        law(culprit)
