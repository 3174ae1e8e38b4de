"""A caller who hands in something wrong reads which argument it was, before anything is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax import checks


def test_letters_are_bound_to_sizes_in_every_argument():
    size = checks.shapes(logps=(np.zeros((3, 5)), "B T"), logits=(np.zeros((3, 5, 7)), "B T V"), beta=(0.1, ""))
    assert dict(size) == {"B": 3, "T": 5, "V": 7}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"logps": ((3, 5), "B")}, "logps has shape (3, 5), expected [B]"),
        ({"logps": ((3,), "B T")}, "logps has shape (3,), expected [B, T]"),
        ({"beta": ((2,), "")}, "beta has shape (2,), expected []"),
        (
            {"logps": ((3, 5), "B T"), "values": ((3, 6), "B T"), "mask": ((3, 6), "B T")},
            "values has shape (3, 6), expected [B, T] with T=5 (from logps)",
        ),
        (  # the first who spoke of T is the witness, whoever agreed with it since
            {"logps": ((3, 5), "B T"), "values": ((3, 5), "B T"), "mask": ((3, 4), "B T")},
            "mask has shape (3, 4), expected [B, T] with T=5 (from logps)",
        ),
        (  # T is first seen in the second argument: that one is the witness, not the first argument
            {"rewards": ((3,), "B"), "logps": ((3, 5), "B T"), "mask": ((3, 4), "B T")},
            "mask has shape (3, 4), expected [B, T] with T=5 (from logps)",
        ),
        (  # an axis of size 1 would broadcast, which is how wrong shapes usually pass unseen
            {"logps": ((3, 5), "B T"), "mask": ((1, 5), "B T")},
            "mask has shape (1, 5), expected [B, T] with B=3 (from logps)",
        ),
    ],
)
def test_a_wrong_shape_is_told_with_the_argument_it_disagrees_with(arrays, message):
    with pytest.raises(ValueError) as error:
        checks.shapes(**{name: (np.zeros(shape), letters) for name, (shape, letters) in arrays.items()})
    assert str(error.value) == message


def test_a_wrong_shape_is_found_while_tracing():
    def fn(a, b):
        checks.shapes(a=(a, "B T"), b=(b, "B T"))
        return jax.pure_callback(lambda: pytest.fail("the program ran"), jax.ShapeDtypeStruct((), jnp.float32))

    with pytest.raises(ValueError, match="b has shape"):
        jax.jit(fn)(jnp.zeros((3, 5)), jnp.zeros((3, 4)))


@pytest.mark.parametrize("value", [0.0, 0.49, np.float32(0.25), jnp.float32(0.25), jnp.zeros(())])
def test_between_includes_the_lower_end(value):
    checks.between("label_smoothing", value, 0.0, 0.5)


@pytest.mark.parametrize("value", [0.5, -0.01, float("nan"), float("inf"), jnp.float32(0.5)])
def test_between_excludes_the_upper_end_and_what_is_no_number(value):
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0.0, 0.5\), got "):
        checks.between("label_smoothing", value, 0.0, 0.5)


@pytest.mark.parametrize("value", [0, 0.0, -0.1, float("nan"), jnp.float32(0)])
def test_positive_refuses_zero_and_what_is_no_number(value):
    with pytest.raises(ValueError, match="beta must be above 0, got "):
        checks.positive("beta", value)


def test_a_traced_value_passes_because_it_has_no_number_yet():
    def fn(x):
        checks.between("x", x, 0.0, 0.5)
        checks.positive("x", x)
        return x

    assert jax.jit(fn)(-3.0) == -3
    np.testing.assert_array_equal(jax.vmap(fn)(jnp.array([-3.0, 7.0])), [-3, 7])
