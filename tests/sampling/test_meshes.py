"""However many devices draw and however the weights are split over them, the samples are the same."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from pt_jax.models import Config, bind, init
from pt_jax.sampling import Draft, Sampling, beam_search, sample, sample_queue, sample_until, speculate
from pt_jax.training import sharding

CONFIG = Config(vocab=32, layers=2, width=16, heads=4, kv_heads=4, head_width=4, hidden=32, eps=1e-3, tied=False)
MODEL = bind(CONFIG)
PARAMS = jax.tree.map(lambda x: x * 12 if x.ndim > 2 or x.shape[0] == 32 else x, init(CONFIG, jax.random.key(0)))
RNG = np.random.default_rng(2)
PROMPTS = RNG.integers(0, 32, (8, 6)).astype(np.int32)
SEEN = np.arange(6) >= RNG.integers(0, 6, (8, 1))


def drawing(by, params, prompts, seen, model=MODEL, **more):
    return by(
        params, prompts, seen, jax.random.key(4), apply=model.apply, init_cache=model.init_cache, length=20, group=2,
        end_tokens=(3, 9), pad_token=3, how=Sampling(0.8, top_p=0.95), **more,
    )  # fmt: skip


def drawn(*args, **more):
    return jax.tree.map(np.asarray, drawing(*args, **more))


SHAPES = [{"data": 8}, {"data": 2, "tensor": 4}, {"fsdp": 2, "context": 2, "tensor": 2}]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("by", "more"), [(sample, {}), (sample_queue, {"slots": 8})], ids=["sample", "queue"])
def test_the_samples_are_those_of_one_device(by, more, shape):
    expected = drawn(sample, PARAMS, PROMPTS, SEEN)
    assert len({row.tobytes() for row in expected.tokens}) > 8 and 1 < expected.alive.sum(1).min() < 20
    mesh = sharding.make_mesh(**shape)
    params = jax.device_put(PARAMS, sharding.by_name(PARAMS, mesh))
    got = drawn(by, params, *jax.device_put((PROMPTS, SEEN), sharding.rows(mesh)), **more)
    same(got, expected)


def same(got, expected):
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_array_equal(got.alive, expected.alive)
    np.testing.assert_allclose(got.logps, expected.logps, rtol=0, atol=1e-5)


ENGINES = {
    "stream": functools.partial(sample_until, chunk=8),
    "look-up": lambda *given, **more: speculate(*given, **more)[0],
    "draft": lambda params, *given, **more: speculate(
        params, *given, draft=Draft(params, *MODEL), ahead=2, **more
    )[0],
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("by", ENGINES.values(), ids=ENGINES)
def test_other_engines_draw_the_samples_of_one_device(by, shape):
    """Groups share their prompts, some of which are on other devices than their rows."""
    mesh = sharding.make_mesh(**shape)
    params = jax.device_put(PARAMS, sharding.by_name(PARAMS, mesh))
    expected = drawn(sample, PARAMS, PROMPTS, SEEN)
    same(drawn(by, params, *jax.device_put((PROMPTS, SEEN), sharding.rows(mesh))), expected)


def test_beams_are_those_of_one_device():
    ask = lambda *args: jax.tree.map(np.asarray, beam_search(
        *args, apply=MODEL.apply, init_cache=MODEL.init_cache, length=20, end_tokens=(7, 28), pad_token=3, beams=3,
    ))  # fmt: skip
    expected, scores = ask(PARAMS, PROMPTS, SEEN)
    assert len(set(expected.alive.sum(1))) > 3
    for shape in SHAPES[:2]:
        mesh = sharding.make_mesh(**shape)
        params = jax.device_put(PARAMS, sharding.by_name(PARAMS, mesh))
        got, got_scores = ask(params, *jax.device_put((PROMPTS, SEEN), sharding.rows(mesh)))
        same(got, expected)
        np.testing.assert_allclose(got_scores, scores, rtol=0, atol=1e-5)


def test_the_samples_of_experts_on_several_devices_are_those_of_one():
    config = dataclasses.replace(CONFIG, experts=4, experts_per_token=2, expert_hidden=12)
    params, model = jax.tree.map(lambda x: x * 12 if x.ndim > 2 else x, init(config, jax.random.key(0))), bind(config)
    expected = drawn(sample, params, PROMPTS, SEEN, model=model)
    assert len({row.tobytes() for row in expected.tokens}) > 8
    mesh = sharding.make_mesh(expert=4, tensor=2)
    model = model._replace(apply=sharding.within(mesh, model.apply))
    placed = jax.device_put(params, sharding.by_name(params, mesh))
    same(drawn(sample, placed, *jax.device_put((PROMPTS, SEEN), sharding.rows(mesh)), model=model), expected)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_the_cache_is_split_as_the_table_says(shape):
    """By the compiler alone, from where prompts and weights lie; whole, it would be most of a device's memory."""
    mesh = sharding.make_mesh(**shape)
    cache = jax.eval_shape(lambda: MODEL.init_cache(16, 26))
    k = sharding.by_name(cache, mesh, sharding.CACHE)["k"].shard_shape(cache["k"].shape)
    placed = jax.device_put((PARAMS, PROMPTS, SEEN), (sharding.by_name(PARAMS, mesh), *[sharding.rows(mesh)] * 2))
    program = jax.jit(lambda *x: drawing(sample, *x)).lower(*placed).compile({"xla_backend_optimization_level": 0})
    shapes = set(re.findall(r"f32\[2,\d+,\d+,4,\d\d\]", program.as_text()))
    assert shapes and all(np.prod(k[:4]) >= np.prod([int(n) for n in re.findall(r"\d+", x[3:])[:4]]) for x in shapes)
