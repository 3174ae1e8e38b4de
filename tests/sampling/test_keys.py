"""A key for all rows, or each row's own: then its sample is that of the row alone, whoever shares its batch."""

import functools

import jax
import numpy as np
import pytest

from pt_jax.models import Config, bind, init
from pt_jax.sampling import Sampling, sample, sample_queue, sample_until, speculate

V, N, G = 29, 12, 2
CONFIG = Config(vocab=V, layers=1, width=16, heads=2, kv_heads=1, head_width=8, hidden=16, eps=1e-3, qk_norm=False)
MODEL = bind(CONFIG)
PARAMS = jax.tree.map(lambda x: x * 12 if x.ndim > 2 or x.shape[0] == V else x, init(CONFIG, jax.random.key(0)))
PROMPTS = np.array([[1, 1, 5, 6, 7], [1, 1, 1, 1, 4], [1, 1, 5, 6, 7]], np.int32)  # the first and the last are equal
SEEN = np.array([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [0, 0, 1, 1, 1]], bool)
SETTINGS = {
    "apply": MODEL.apply, "init_cache": MODEL.init_cache, "length": N, "end_tokens": (3, 17), "pad_token": 3,
    "how": Sampling(0.9, repetition_penalty=1.1),
}  # fmt: skip
SEEDS = np.array([7, 7, 1, 0, 7, 2])
KEYS = jax.vmap(jax.random.key)(SEEDS)
# Tiny programs compile longer than they run: half as long like this.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def compiled(by, group, **fixed):
    run = lambda params, prompts, seen, key, more: by(
        params, prompts, seen, key, group=group, **SETTINGS, **fixed, **more
    )
    return run if by is sample_until else jit(run)


def ask(key, by=sample, rows=(0, 1, 2), group=G, fixed=(), **more):
    rows = np.array(rows)
    out = compiled(by, group, **dict(fixed))(PARAMS, PROMPTS[rows], SEEN[rows], key, more)
    return jax.tree.map(np.asarray, out[0] if by is speculate else out)


@pytest.fixture(scope="module")
def batch():
    return ask(KEYS)


def assert_row(batch, row, other, of=0):
    np.testing.assert_array_equal(batch.tokens[row], other.tokens[of])
    np.testing.assert_array_equal(batch.alive[row], other.alive[of])
    np.testing.assert_allclose(batch.logps[row], other.logps[of], rtol=0, atol=1e-5)


def test_a_row_with_its_own_key_is_that_row_alone(batch):
    """Without company, without a group, with the one key."""
    for row in range(6):
        assert_row(batch, row, ask(KEYS[row], rows=[row // G], group=1))
    assert len({row.tobytes() for row in batch.tokens}) == 4


def test_equal_prompts_with_equal_keys_have_equal_samples(batch):
    """In one group and in two; with other keys, or other prompts, they are others."""
    for row in (1, 4):
        assert_row(batch, 0, batch, row)
    differ = lambda a, b: (batch.tokens[a] != batch.tokens[b]).any()
    assert differ(0, 5) and differ(4, 5) and differ(0, 2)


def test_ids_tell_rows_with_equal_keys_apart(batch):
    out = ask(KEYS, prompt_ids=np.array([0, 0, 8]))
    assert_row(batch, 1, out, 1)
    assert (out.tokens[4] != batch.tokens[4]).any()
    assert_row(out, 4, ask(KEYS[4], rows=[2], group=1, prompt_ids=np.array([8])))


@pytest.mark.parametrize(
    ("by", "fixed"),
    [(sample_queue, (("slots", 2),)), (sample_until, (("chunk", 5),)), (speculate, ())],
    ids=["queue", "until", "guesses"],
)
def test_every_engine_takes_a_key_a_row(batch, by, fixed):
    out = ask(KEYS, by=by, fixed=fixed)
    for row in range(6):
        assert_row(batch, row, out, row)


@pytest.mark.parametrize("old", [jax.random.PRNGKey, lambda seed: np.asarray(jax.random.PRNGKey(seed))])
def test_keys_of_the_old_kind_are_those_of_the_new(batch, old):
    for row in range(6):
        assert_row(ask(jax.random.key(3)), row, ask(old(3)), row)
        assert_row(ask(np.stack([np.asarray(old(seed)) for seed in SEEDS])), row, batch, row)


@pytest.mark.parametrize("by", [sample, functools.partial(sample_queue, slots=2), sample_until, speculate])
@pytest.mark.parametrize(
    ("key", "message"),
    [
        (KEYS[:3], r"key has shape \(3,\); give one key, or one for each of 6 rows"),
        (KEYS.reshape(3, 2), r"key has shape \(3, 2\); give one key"),
        (0, r"key must be of jax.random.key\(seed\), or an array of such, got int"),
        (None, "key must be of jax.random.key.*, got NoneType"),
        (np.zeros(3, np.uint32), r"got an array of type uint32 and shape \(3,\)"),
        (np.zeros(2, np.float32), r"got an array of type float32 and shape \(2,\)"),
    ],
    ids=["3", "3 x 2", "int", "None", "words", "floats"],
)
def test_what_is_no_key_is_a_sentence(by, key, message):
    with pytest.raises(ValueError, match=message):
        by(PARAMS, PROMPTS, SEEN, key, group=G, **SETTINGS)
