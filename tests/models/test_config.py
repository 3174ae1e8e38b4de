"""A config that cannot be a model is refused where it is made, by a sentence and not by a shape error later."""

import dataclasses

import pytest

from pt_jax.models.config import Config

SIZES = {"vocab": 37, "layers": 2, "width": 20, "heads": 6, "kv_heads": 3, "head_width": 4, "hidden": 28}


@pytest.mark.parametrize("name", [*SIZES, "max_length"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_size_below_one_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be at least 1, got {value}$"):
        Config(**SIZES | {name: value})


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"^kv_heads=4 does not divide heads=6$"):
        Config(**SIZES | {"kv_heads": 4})


def test_an_odd_head_is_refused():
    with pytest.raises(ValueError, match=r"^head_width=5 is odd"):
        Config(**SIZES | {"head_width": 5})


def test_a_window_below_zero_is_refused():
    with pytest.raises(ValueError, match=r"^windows must be at least 0, got -3$"):
        Config(**SIZES, windows=(4, -3))


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_a_share_of_a_head_is_a_share(fraction):
    with pytest.raises(ValueError, match=rf"^rope_fraction must be above 0 and at most 1, got {fraction}$"):
        Config(**SIZES, rope_fraction=fraction)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_every_divisor_of_the_heads_is_taken_and_the_width_need_not_be_theirs(kv_heads):
    assert Config(**SIZES | {"kv_heads": kv_heads}).kv_heads == kv_heads


def test_equal_configs_are_one_key():
    """A jitted function with the config as a static argument is traced once for all of them."""
    one, two = Config(**SIZES, end_tokens=(1, 2)), Config(**SIZES, end_tokens=(1, 2))
    assert one == two and hash(one) == hash(two)
    assert len({one, two, dataclasses.replace(one, eps=1e-5)}) == 2


def test_a_config_does_not_change():
    """It is closed over by compiled functions, which would not notice."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config(**SIZES).eps = 1.0


def test_a_replaced_field_is_checked_as_well():
    with pytest.raises(ValueError, match="heads"):
        dataclasses.replace(Config(**SIZES), heads=7)
