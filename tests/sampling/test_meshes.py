"""However many devices draw and however the weights are split over them, the samples are the same."""

import jax
import numpy as np
import pytest

from pt_jax.models import Config, bind, init
from pt_jax.sampling import Sampling, sample, sample_queue
from pt_jax.training import sharding

CONFIG = Config(vocab=32, layers=2, width=16, heads=4, kv_heads=4, head_width=4, hidden=32, eps=1e-3, tied=False)
MODEL = bind(CONFIG)
PARAMS = jax.tree.map(lambda x: x * 12 if x.ndim > 2 or x.shape[0] == 32 else x, init(CONFIG, jax.random.key(0)))
RNG = np.random.default_rng(2)
PROMPTS = RNG.integers(0, 32, (8, 6)).astype(np.int32)
SEEN = np.arange(6) >= RNG.integers(0, 6, (8, 1))


def drawn(by, params, prompts, seen, **more):
    out = by(
        params, prompts, seen, jax.random.key(4), apply=MODEL.apply, init_cache=MODEL.init_cache, length=20, group=2,
        end_tokens=(3, 9), pad_token=3, how=Sampling(0.8, top_p=0.95), **more,
    )  # fmt: skip
    return jax.tree.map(np.asarray, out)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 1, 4), (2, 2, 2)], ids=str)
@pytest.mark.parametrize(("by", "more"), [(sample, {}), (sample_queue, {"slots": 8})], ids=["sample", "queue"])
def test_the_samples_are_those_of_one_device(by, more, shape):
    expected = drawn(sample, PARAMS, PROMPTS, SEEN)
    assert len({row.tobytes() for row in expected.tokens}) > 8 and 1 < expected.alive.sum(1).min() < 20
    mesh = sharding.make_mesh(*shape)
    params = jax.device_put(PARAMS, sharding.by_name(PARAMS, mesh))
    got = drawn(by, params, *jax.device_put((PROMPTS, SEEN), sharding.rows(mesh)), **more)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_array_equal(got.alive, expected.alive)
    np.testing.assert_allclose(got.logps, expected.logps, rtol=0, atol=1e-5)
