"""A queue on several devices: its lanes, its pool and what is kept are split as the compiler likes."""

import functools

import jax
import numpy as np
import pytest

from pt_jax.models import Config, bind, init
from pt_jax.sampling import Sampling, lanes, sample, sample_queue
from pt_jax.training import sharding

CONFIG = Config(
    vocab=32, layers=2, width=16, heads=4, kv_heads=4, head_width=4, hidden=32, eps=1e-3, tied=False, windows=(0, 4)
)
MODEL = bind(CONFIG)
PARAMS = jax.tree.map(lambda x: x * 12 if x.ndim > 2 or x.shape[0] == 32 else x, init(CONFIG, jax.random.key(0)))
RNG = np.random.default_rng(2)
PROMPTS = RNG.integers(0, 32, (8, 6)).astype(np.int32)
SEEN = np.arange(6) >= RNG.integers(0, 6, (8, 1))
# Tiny programs compile longer than they run: half as long like this.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def drawn(by, params, prompts, seen, **more):
    run = jit(lambda *given: by(
        *given, jax.random.key(4), apply=MODEL.apply, init_cache=MODEL.init_cache, length=20, group=3,
        end_tokens=(3, 9), pad_token=3, how=Sampling(0.8, top_p=0.95), keep=("position",), **more,
    ))  # fmt: skip
    return jax.tree.map(np.asarray, run(params, prompts, seen))


@pytest.fixture(scope="module")
def plain():
    out = drawn(sample, PARAMS, PROMPTS, SEEN)
    assert len(set(out.alive.sum(1))) > 5
    return out


@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 2, "tensor": 4}], ids=str)
def test_the_samples_of_a_queue_are_those_of_the_plain_loop_on_one_device(plain, monkeypatch, shape):
    """Through three lanes of 6, 3 and 1 slots, which no axis divides."""
    monkeypatch.setattr(lanes, "rooms_of", lambda read, columns: [read + 4, read + 9, columns])
    mesh = sharding.make_mesh(**shape)
    params = jax.device_put(PARAMS, sharding.by_name(PARAMS, mesh))
    got = drawn(sample_queue, params, *jax.device_put((PROMPTS, SEEN), sharding.rows(mesh)), slots=6)
    for name in ("tokens", "alive", "ended"):
        np.testing.assert_array_equal(getattr(got, name), getattr(plain, name), err_msg=name)
    np.testing.assert_allclose(got.logps, plain.logps, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(got.kept["position"], plain.kept["position"])
