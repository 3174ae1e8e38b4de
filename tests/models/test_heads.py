"""Scores, rewards and values: where in a row they are read, whatever stands in padding, and that they learn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_models

from pt_jax import advantages, logps
from pt_jax.losses import reward_model, value
from pt_jax.models import Config, apply, decoder, heads, init, load, save
from pt_jax.training import init_state, make_train_step

LANGUAGE = Config(vocab=23, layers=2, width=20, heads=6, kv_heads=2, head_width=4, hidden=18, rope_base=5e5, tied=False)
CONFIG = dataclasses.replace(LANGUAGE, head="score")
LENGTHS = (7, 3, 1, 5)
T = 9

jit = functools.partial(small_models.jit, static_argnums=0)
scores, rewards, values = map(jit, (heads.scores, heads.rewards, heads.values))


def weights(config=CONFIG):
    return small_models.weights(config)


def rows(seed=1):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CONFIG.vocab, n).astype(np.int32) for n in LENGTHS]


SIDES = {"left": lambda n: n, "right": lambda n: 0, "both": lambda n: n // 2}


def padded(side, fill=0):
    """Rows with padding on one side or both: tokens, seen, where each begins."""
    tokens, seen = np.full((len(LENGTHS), T), fill, np.int32), np.zeros((len(LENGTHS), T), bool)
    starts = [SIDES[side](T - n) for n in LENGTHS]
    for i, (row, start) in enumerate(zip(rows(), starts)):
        tokens[i, start : start + len(row)], seen[i, start : start + len(row)] = row, True
    return tokens, seen, starts


@functools.cache
def alone():
    """The scores of each row without padding, in float64 from the last hidden states."""
    hidden = jit(lambda config, *a: decoder.hidden(config, *a)[0])
    out = []
    for row in rows():
        tokens = np.pad(row, (0, T - len(row)))[None]
        x = hidden(CONFIG, weights(), tokens, np.arange(T)[None] < len(row))
        out.append((np.asarray(x, np.float64) @ np.asarray(weights()["score"], np.float64))[0, : len(row)])
    return out


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * max(np.abs(x).max() for x in alone()))


@pytest.mark.parametrize("side", SIDES)
def test_a_score_is_the_product_of_the_head_and_the_last_hidden_state(side):
    tokens, seen, starts = padded(side)
    got = scores(CONFIG, weights(), tokens, seen)
    assert got.shape == (4, T) and got.dtype == jnp.float32
    for mine, row, start in zip(np.asarray(got), alone(), starts):
        close(mine[start : start + len(row)], row)
    assert (np.asarray(got)[~seen] == 0).all()


@pytest.mark.parametrize("side", SIDES)
def test_a_reward_is_the_score_at_the_last_token(side):
    tokens, seen, _ = padded(side)
    close(rewards(CONFIG, weights(), tokens, seen), [row[-1] for row in alone()])


@pytest.mark.parametrize("side", SIDES)
def test_a_value_is_the_score_before_the_token_is_there(side):
    tokens, seen, starts = padded(side)
    got = np.asarray(values(CONFIG, weights(), tokens, seen))
    for mine, row, start in zip(got, alone(), starts):
        close(mine[start : start + len(row)], [0, *row[:-1]])
    assert (got[~seen] == 0).all()


def test_values_move_as_everything_does_that_speaks_of_tokens():
    """Law 1: rows that are all text go through the project's one shift."""
    tokens = np.stack([np.resize(row, T) for row in rows()])
    seen = np.ones_like(tokens, bool)
    moved = logps.align(scores(CONFIG, weights(), tokens, seen)[:, :-1])
    np.testing.assert_array_equal(values(CONFIG, weights(), tokens, seen), moved)


def test_a_token_does_not_change_its_own_value():
    tokens, seen, _ = padded("right")
    changed = tokens.copy()
    changed[:, 2] = (changed[:, 2] + 1) % CONFIG.vocab
    before, after = (np.asarray(values(CONFIG, weights(), x, seen)) for x in (tokens, changed))
    np.testing.assert_array_equal(after[:, :3], before[:, :3])
    assert (after[0, 3:7] != before[0, 3:7]).all()


def test_padding_changes_nothing_and_may_be_the_end_token():
    for fn in (scores, rewards, values):
        np.testing.assert_array_equal(*(fn(CONFIG, weights(), *padded("both", fill)[:2]) for fill in (0, 17)))
    tokens, seen, _ = padded("right")
    tokens[0, 6] = 0  # a text that ends in what fills the others
    got = rewards(CONFIG, weights(), tokens, seen)
    np.testing.assert_array_equal(got, scores(CONFIG, weights(), tokens, seen)[np.arange(4), np.array(LENGTHS) - 1])


def test_a_row_without_tokens_has_the_reward_0_and_no_gradient():
    tokens, seen, _ = padded("left")
    seen = seen & (np.arange(4) != 1)[:, None]
    got = np.asarray(rewards(CONFIG, weights(), tokens, seen))
    assert got[1] == 0 and np.isfinite(got).all()
    gradient = jit(jax.grad(lambda config, *a: heads.rewards(config, *a)[1], 1))(CONFIG, weights(), tokens, seen)
    assert all((g == 0).all() for g in jax.tree.leaves(gradient))


def test_texts_that_share_a_row_have_their_own_values():
    a, b, c = rows()[0], rows()[1], rows()[3][:3]
    tokens = np.concatenate([a, b, c, [0]])[None].astype(np.int32)
    seen = np.repeat([1, 2, 3, 0], [7, 3, 3, 1])[None].astype(np.int32)
    got = np.asarray(values(CONFIG, weights(), tokens, seen))[0]
    close(got, [0, *alone()[0][:-1], 0, *alone()[1][:-1], 0, *alone()[3][:2], 0])
    of_tokens = np.asarray(scores(CONFIG, weights(), tokens, seen))[0]
    close(of_tokens[[6, 9]], [alone()[0][-1], alone()[1][-1]])


def test_the_first_token_of_an_answer_has_the_value_of_the_prompt_that_it_shares():
    """A prompt, and two answers to it: the second comes after the prompt, not after the first."""
    prompt, one, two = rows()[0][:3], rows()[0][3:], rows()[3][:2]
    texts = [np.concatenate([prompt, answer]) for answer in (one, two)]
    expected = [values(CONFIG, weights(), x[None], np.ones((1, len(x)), bool))[0] for x in texts]
    tokens = np.concatenate([prompt, one, two])[None]
    branch = np.repeat([0, 1, 2], [3, 4, 2])
    seen = np.stack([np.ones(9), branch], -1)[None].astype(np.int32)
    got = np.asarray(values(CONFIG, weights(), tokens, seen))[0]
    close(got[:7], expected[0])
    close(got[7:], expected[1][3:])
    assert got[7] == got[3] != 0


def test_the_head_multiplies_in_float32_whatever_the_model_computes_in(monkeypatch):
    tokens, seen, _ = padded("left")
    x, w = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate([(4, T, 20), (20,)]))
    monkeypatch.setattr(decoder, "hidden", lambda *a, how: (x, None))
    got = heads.scores(CONFIG, {"score": w}, tokens, seen)
    assert got.dtype == jnp.float32
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    np.testing.assert_allclose(np.asarray(got)[seen], expected[seen], atol=1e-5)


# ---- from a language model, and back to disk


def test_a_language_model_gives_its_trunk():
    language = weights(LANGUAGE)
    params, config = heads.from_language_model(language, LANGUAGE, jax.random.key(0))
    assert config == CONFIG and sorted(params) == ["embed", "layers", "norm", "score"]
    assert params["embed"] is language["embed"] and params["layers"] is language["layers"]
    jax.tree.map(lambda a, b: None, params, jax.eval_shape(lambda: init(config, jax.random.key(0))))
    tied, config = heads.from_language_model(
        weights(dataclasses.replace(LANGUAGE, tied=True)), dataclasses.replace(LANGUAGE, tied=True), jax.random.key(0)
    )
    assert config.tied and "unembed" not in tied


def test_the_head_is_0_without_a_key_and_of_the_deviation_of_the_paper_with_one():
    wide = dataclasses.replace(LANGUAGE, width=4095)
    params = {"norm": jnp.ones(4095, jnp.bfloat16), "unembed": jnp.ones((23, 4095))}
    w = heads.from_language_model(params, wide, jax.random.key(0))[0]["score"]
    assert w.dtype == jnp.bfloat16
    np.testing.assert_allclose([w.astype(float).mean() * 64, w.astype(float).std() * 64], [0, 1], atol=0.05)
    assert (heads.from_language_model(params, wide)[0]["score"] == 0).all()


def test_each_model_is_asked_for_what_it_has():
    tokens, seen, _ = padded("left")
    for fn in (heads.scores, heads.rewards, heads.values):
        with pytest.raises(ValueError, match=r"config.head is 'tokens': .* use heads.from_language_model"):
            fn(LANGUAGE, weights(LANGUAGE), tokens, seen)
    with pytest.raises(ValueError, match=r"scores texts and has no logits; use models.heads"):
        apply(CONFIG, weights(), tokens, seen)
    with pytest.raises(ValueError, match="has a head already"):
        heads.from_language_model(weights(), CONFIG)
    with pytest.raises(ValueError, match="seen numbers the texts of packed rows; give bool"):
        heads.rewards(CONFIG, weights(), tokens, seen.astype(np.int32))
    with pytest.raises(ValueError, match=r"^seen has shape"):
        heads.rewards(CONFIG, weights(), tokens, seen[:, :-1])


def test_a_folder_gives_back_what_was_saved(tmp_path):
    save(tmp_path / "model", weights(), dataclasses.replace(CONFIG, end_tokens=(3,), pad_token=0))
    params, config = load(tmp_path / "model")
    assert config == dataclasses.replace(CONFIG, end_tokens=(3,), pad_token=0)
    jax.tree.map(np.testing.assert_array_equal, params, weights())
    assert not (tmp_path / "model" / "generation_config.json").exists()


@pytest.mark.parametrize("family", ["ernie4_5", "ernie4_5_moe"])
def test_a_family_without_such_a_class_is_not_saved(tmp_path, family):
    config = dataclasses.replace(CONFIG, family=family, qk_norm=False, rope_interleaved=True)
    with pytest.raises(ValueError, match=rf"transformers has no class for scores of the family {family}"):
        save(tmp_path / "model", weights(config), config)
    assert not (tmp_path / "model").exists()


# ---- training

PLAIN = dataclasses.replace(LANGUAGE, layers=1, qk_norm=False)
SHALLOW = dataclasses.replace(PLAIN, head="score")


def test_a_reward_model_learns_preferences():
    """Texts that end in an even token are better; eight steps order all sixteen pairs."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 22, (2, 16, 6)).astype(np.int32)
    tokens[0, :, -1], tokens[1, :, -1] = tokens[0, :, -1] // 2 * 2, tokens[1, :, -1] // 2 * 2 + 1
    batch = {"tokens": tokens.swapaxes(0, 1)}  # [B, 2, T]: chosen, rejected

    def loss_fn(params, frozen, batch, key):
        rows = batch["tokens"].reshape(32, 6)
        both = heads.rewards(SHALLOW, params, rows, jnp.ones(rows.shape, bool)).reshape(16, 2).T
        accuracies = reward_model.reward_accuracy(*both)
        return reward_model.bradley_terry(*both).mean(), {"rewards/accuracies": accuracies.mean()}

    fresh = heads.from_language_model(init(PLAIN, jax.random.key(0)), PLAIN, jax.random.key(1))[0]
    history = learned(loss_fn, fresh, batch, steps=8)
    assert history[0]["rewards/accuracies"] < 0.8 and history[-1]["rewards/accuracies"] == 1
    assert history[-1]["loss"] < 0.1 < history[0]["loss"]


def test_a_critic_learns_returns():
    """The score of a row is whether its second token is even: known from column 2 on, so the last error is small."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 22, (16, 6)).astype(np.int32)
    seen = np.ones((16, 6), bool)
    mask = np.arange(6)[None] >= np.array([2] * 16)[:, None]
    rewards_of_tokens = advantages.score_at_end((tokens[:, 1] % 2 == 0).astype(np.float32), mask)
    returns = advantages.reward_to_go(rewards_of_tokens, mask)
    batch = {"tokens": tokens, "seen": seen, "mask": mask, "returns": np.asarray(returns)}

    def loss_fn(params, frozen, batch, key):
        got = heads.values(SHALLOW, params, batch["tokens"], batch["seen"])
        return value.value_loss(got, batch["returns"], batch["mask"]).sum() / batch["mask"].sum(), {}

    fresh = heads.from_language_model(init(PLAIN, jax.random.key(0)), PLAIN)[0]
    history = learned(loss_fn, fresh, batch, steps=40)
    np.testing.assert_allclose(history[0]["loss"], (batch["returns"] ** 2)[mask].mean() / 2, rtol=1e-5)  # it says 0
    assert history[-1]["loss"] < 0.02


def learned(loss_fn, params, batch, steps):
    optimizer = optax.adam(2e-2)
    state, history = init_state(params, optimizer, jax.random.key(0)), []
    step = make_train_step(loss_fn, optimizer).lower(state, None, batch).compile({"xla_backend_optimization_level": 0})
    for _ in range(steps):
        state, metrics = step(state, None, batch)
        history.append(jax.device_get(metrics))
    return history
