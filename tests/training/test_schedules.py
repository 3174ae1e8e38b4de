"""Rates over a run, step by step, against numbers worked out by hand."""

import math

import jax
import numpy as np
import pytest

from pt_jax.training import schedules

EVERY = pytest.mark.parametrize("schedule", [schedules.linear, schedules.cosine, schedules.constant, schedules.wsd])


def rates(schedule, steps, **options):
    rate = jax.jit(schedule(0.01, steps, **options))
    return [float(rate(step)) / 0.01 for step in range(steps)]


HALF_COSINE = [(1 + math.cos(math.pi * t / 7)) / 2 for t in range(7)]


@pytest.mark.parametrize(
    ("schedule", "steps", "options", "expected"),
    [
        (schedules.linear, 4, {}, [1, 3 / 4, 2 / 4, 1 / 4]),
        (schedules.linear, 4, {"final": 1.0}, [1, 1, 1, 1]),
        (schedules.linear, 4, {"final": 0.5}, [1, 7 / 8, 6 / 8, 5 / 8]),
        # warm-up from 1/4 to the peak at step 3, then down to 0 at step 10, which is never taken
        (schedules.linear, 10, {"warmup": 0.3}, [1 / 4, 2 / 4, 3 / 4, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]),
        (schedules.linear, 4, {"warmup": 0.5, "final": 1.0}, [1 / 3, 2 / 3, 1, 1]),
        (schedules.linear, 1, {"warmup": 0.1}, [1]),
        (schedules.cosine, 7, {}, HALF_COSINE),
        (schedules.cosine, 7, {"final": 0.1}, [0.1 + 0.9 * x for x in HALF_COSINE]),
        (schedules.cosine, 10, {"warmup": 0.3}, [1 / 4, 2 / 4, 3 / 4, *HALF_COSINE]),
        (schedules.constant, 4, {}, [1, 1, 1, 1]),
        (schedules.constant, 4, {"warmup": 0.5}, [1 / 3, 2 / 3, 1, 1]),
        (schedules.wsd, 10, {"warmup": 0.2, "decay": 0.4}, [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        (schedules.wsd, 5, {"decay": 0.4, "final": 0.5}, [1, 1, 1, 1, 3 / 4]),
        (schedules.wsd, 4, {"decay": 1.0}, [1, 3 / 4, 2 / 4, 1 / 4]),
        (schedules.wsd, 4, {"warmup": 0.5, "decay": 1.0}, [1 / 3, 2 / 3, 1, 1 / 2]),
        (schedules.wsd, 1, {}, [1]),
    ],
)
def test_the_rate_of_every_step(schedule, steps, options, expected):
    np.testing.assert_allclose(rates(schedule, steps, **options), expected, rtol=1e-4)


@EVERY
def test_no_update_is_lost_to_a_rate_of_zero(schedule):
    assert min(rates(schedule, 20, warmup=0.5)) > 0


@EVERY
def test_the_peak_may_be_traced(schedule):
    """So that one program serves many rates."""
    many = jax.vmap(lambda peak: schedule(peak, 9, warmup=0.2)(np.int32(5)))(np.float32([1.0, 3.0]))
    np.testing.assert_allclose(many, [schedule(peak, 9, warmup=0.2)(np.int32(5)) for peak in (1.0, 3.0)], rtol=1e-6)


OUT_OF_RANGE = {
    "learning_rate": (0.0, float("nan")), "steps": (0,), "warmup": (1.0, -0.1), "final": (1.5, float("nan")),
    "decay": (0.0, 1.1),
}  # fmt: skip


@pytest.mark.parametrize(
    ("schedule", "name", "value"),
    [
        *((schedule, name, value)
          for schedule in (schedules.linear, schedules.cosine, schedules.constant)
          for name in ("learning_rate", "steps", "warmup") for value in OUT_OF_RANGE[name]),
        *((schedule, "final", value)
          for schedule in (schedules.linear, schedules.cosine, schedules.wsd) for value in OUT_OF_RANGE["final"]),
        *((schedules.wsd, "decay", value) for value in OUT_OF_RANGE["decay"]),
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_refused(schedule, name, value):
    options = {"peak": 0.1, "steps": 3} | {{"learning_rate": "peak"}.get(name, name): value}
    with pytest.raises(ValueError, match=rf"{name} must be .*, got {value}"):
        schedule(**options)
