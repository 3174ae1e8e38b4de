"""Rows that are added are the mean of the old ones, and what the model says of the old ids stays."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models

from pt_jax.models import Config, apply, heads, init, linear, quantize, save, vocabulary

CONFIG = Config(
    vocab=29, layers=1, width=20, heads=4, kv_heads=2, head_width=6, hidden=18, tied=False, qk_norm=False,
    bos_token=1, end_tokens=(2, 28), pad_token=0,
)  # fmt: skip
TIED = dataclasses.replace(CONFIG, tied=True)
BOTH = pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
jit = functools.partial(small_models.jit, static_argnums=0)
logits_of = jit(lambda *a: apply(*a)[0])


@functools.cache
def weights(config=CONFIG):
    return jax.tree.map(lambda x: 8 * x, init(config, jax.random.key(3)))


def logits(params, config):
    tokens = np.random.default_rng(0).integers(0, 29, (2, 5)).astype(np.int32)
    return np.asarray(logits_of(config, params, tokens, np.ones((2, 5), bool)))


@BOTH
def test_new_rows_are_the_mean_and_old_ones_stay(config):
    params, grown = vocabulary.resize(weights(config), config, 40)
    assert grown == dataclasses.replace(config, vocab=40)
    for name in ("embed", "unembed")[: 1 if config.tied else 2]:
        old = np.asarray(weights(config)[name])
        np.testing.assert_array_equal(params[name][:29], old)
        expected = np.broadcast_to(old.astype(np.float64).mean(0), (11, 20))
        np.testing.assert_allclose(params[name][29:], expected, atol=1e-7)
    assert params["layers"] is weights(config)["layers"]
    assert ("unembed" in params) != config.tied


@BOTH
@pytest.mark.parametrize("more", [1, 3, 99])
def test_old_ids_keep_their_logits_and_new_ones_have_the_mean(config, more):
    """And so all new ids together have at most the share of their number, however negative the old logits are."""
    before = logits(weights(config), config).astype(np.float64)
    after = logits(*vocabulary.resize(weights(config), config, 29 + more)).astype(np.float64)
    close = lambda got, expected: np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * np.abs(before).max())
    close(after[..., :29], before)  # not bit for bit: a product with more columns is added up in another order
    close(after[..., 29:], np.broadcast_to(before.mean(-1, keepdims=True), (2, 5, more)))
    logp = lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))
    lost = logp(before) - logp(after)[..., :29]
    assert lost.min() > -1e-5 and 0 < lost.max() < np.log((29 + more) / 29)


def test_with_a_key_rows_differ_with_the_covariance_of_the_old_ones():
    new = np.asarray(vocabulary.resize(weights(), CONFIG, 29 + 20_000, jax.random.key(0))[0]["embed"][29:], np.float64)
    old = np.asarray(weights()["embed"], np.float64)
    expected = 1e-5 * np.cov(old.T, ddof=0)
    spread = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    np.testing.assert_allclose(np.cov(new.T), expected, atol=0.05 * spread.max())
    np.testing.assert_allclose(new.mean(0), old.mean(0), atol=1e-4)
    params = vocabulary.resize(weights(), CONFIG, 31, jax.random.key(0))[0]
    again = vocabulary.resize(weights(), CONFIG, 31, jax.random.key(0))[0]
    jax.tree.map(np.testing.assert_array_equal, params, again)
    noise = [np.asarray(params[name][29:]) - np.asarray(weights()[name]).mean(0) for name in ("embed", "unembed")]
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.7  # one draw each


@pytest.mark.parametrize(
    ("vocab", "multiple", "expected"), [(29, 8, 32), (32, 8, 32), (33, 8, 40), (20, 3, 21), (30, 1, 30)]
)
def test_the_size_is_rounded_up_to_a_multiple(vocab, multiple, expected):
    config = dataclasses.replace(CONFIG, end_tokens=(2,))
    params, sized = vocabulary.resize(weights(), config, vocab, multiple_of=multiple)
    assert sized.vocab == expected == len(params["embed"]) == len(params["unembed"])


@BOTH
def test_fewer_ids_are_the_first_ones(config):
    config = dataclasses.replace(config, end_tokens=(2,))
    params, _ = vocabulary.resize(weights(config), config, 7)
    np.testing.assert_array_equal(params["embed"], weights(config)["embed"][:7])
    same, back = vocabulary.resize(*vocabulary.resize(weights(config), config, 50), 29)
    assert back == config
    jax.tree.map(np.testing.assert_array_equal, same, weights(config))


def test_a_dtype_stays_and_the_mean_is_not_rounded_on_the_way():
    coarse = jnp.full((300, 20), 1.0, jnp.bfloat16).at[0].set(301.0)  # a sum in bfloat16 stops at 256
    params, _ = vocabulary.resize({"embed": coarse}, dataclasses.replace(TIED, vocab=300), 301)
    assert params["embed"].dtype == jnp.bfloat16 and (params["embed"][300] == 2).all()


def test_a_model_that_scores_has_no_unembedding_to_grow():
    params, config = vocabulary.resize(*heads.from_language_model(weights(), CONFIG), 31)
    assert sorted(params) == ["embed", "layers", "norm", "score"] and len(params["embed"]) == 31 and config.vocab == 31


@pytest.mark.parametrize(
    ("vocab", "kwargs", "message"),
    [
        (0, {}, "vocab must be above 0, got 0"),
        (30, {"multiple_of": 0}, "multiple_of must be above 0, got 0"),
        (28, {}, r"vocab=28 drops config.end_tokens\[1\], which is 28; give it another id"),
        (1, {}, "vocab=1 drops config.bos_token, which is 1"),
    ],
)
def test_numbers_that_make_no_model_are_refused(vocab, kwargs, message):
    with pytest.raises(ValueError, match=message):
        vocabulary.resize(weights(), CONFIG, vocab, **kwargs)


def test_an_embedding_that_is_no_array_is_refused():
    small = quantize.int8(weights()["embed"], "btd,vd->btv")
    assert isinstance(small, linear.Weight)
    with pytest.raises(ValueError, match=r"params\['embed'\] is a Int8; fold or dequantise it first"):
        vocabulary.resize(weights() | {"embed": small}, CONFIG, 31)


class Tokenizer:
    """Ids with a gap: fewer than the highest says."""

    def __init__(self, *ids):
        self.ids = ids

    def get_vocab(self):
        return {str(i): i for i in self.ids}

    def save_pretrained(self, path):
        pass


def test_a_tokenizer_with_an_id_too_many_is_refused_with_the_remedy(tmp_path):
    save(tmp_path / "fits", weights(), CONFIG, Tokenizer(0, 1, 28))
    with pytest.raises(ValueError, match=r"/no: the tokenizer has ids up to 29, the embedding only 29 rows; .*, 30\)$"):
        save(tmp_path / "no", weights(), CONFIG, Tokenizer(0, 29))
    assert not (tmp_path / "no").exists()
    save(tmp_path / "no", *vocabulary.resize(weights(), CONFIG, 30), Tokenizer(0, 29))
