"""Honest ratios: what was sampled is scored as it was sampled, and only then compared with what comes after."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pt_jax import advantages, models, weights
from pt_jax.recipes import grpo
from pt_jax.sampling import Completions, Sampling, sample
from pt_jax.training import init_state, make_train_step

VOCAB, END = 16, 3
SIZES = {"layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "head_width": 4, "hidden": 16}
CONFIG = models.Config(vocab=VOCAB, **SIZES, qk_norm=False)
apply, init_cache = models.bind(CONFIG)
PROMPTS, GROUP, LENGTH = 3, 4, 8


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    draw = lambda shape: (rng.normal(size=shape) * 0.35 + (len(shape) < 3 and shape[-1] <= 16)).astype(np.float32)
    tree = jax.tree.map(draw, models.parameters.shapes(CONFIG), is_leaf=lambda x: isinstance(x, tuple))
    return tree | {"embed": rng.normal(size=(VOCAB, 16)).astype(np.float32) * 0.4}


# ---- with a model and the sampler

# what is left out of the first ones has no effect, and they share one program
ALL = Sampling(temperature=1.0, top_k=VOCAB, top_p=1.0, min_p=0.0)
WAYS = {
    "plain": ALL,
    "cooler": ALL.replace(temperature=0.7),
    "top_k": ALL.replace(temperature=0.7, top_k=5),
    "top_p": ALL.replace(top_p=0.8),
    "min_p": ALL.replace(min_p=0.1),
    "all": ALL.replace(temperature=1.3, top_k=9, top_p=0.9, min_p=0.05),
}


def rollout(params, how, pad_token=END, seed=0):
    """The batch of some samples, with rewards that have nothing simple about them, and what was sampled."""
    seen = np.arange(4) >= 4 - np.array([2, 4, 1])[:, None]
    prompts = np.where(seen, np.random.default_rng(1).integers(0, VOCAB, seen.shape), pad_token).astype(np.int32)
    out = sample(
        params, prompts, seen, jax.random.key(seed), apply=apply, init_cache=init_cache, length=LENGTH,
        end_tokens=(END, 9), pad_token=pad_token, group=GROUP, how=how,
    )  # fmt: skip
    rewards = np.random.default_rng(2).normal(size=(PROMPTS, GROUP)).astype(np.float32)
    rewards[1, 2] = np.nan
    return grpo.make_batch(prompts, seen, out, rewards), out


def loss_of_frozen(params, frozen, batch, key):
    """The recipe's loss with its numbers as arguments, so that one program serves all of them."""
    how, clip = frozen
    return grpo.make_loss(apply, how=how, clip_low=clip, clip_high=clip)(params, None, batch, key)


SGD = optax.inject_hyperparams(optax.sgd)(learning_rate=0.0)


@functools.cache
def step_of(microbatches):
    return make_train_step(loss_of_frozen, SGD, microbatches=microbatches)


def state_of(params, rate):
    state = init_state(params, SGD, jax.random.key(0))
    state.opt_state.hyperparams["learning_rate"] = jnp.float32(rate)
    return state


def next_batch(batch, metrics):
    return batch | {"old_logps": metrics["logps"], "fresh": np.zeros_like(batch["fresh"])}


@pytest.mark.parametrize("microbatches", [1, 2, 4])
@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_on_the_first_update_every_ratio_is_exactly_1(params, how, microbatches):
    """The interval from 1 to 1 counts a ratio that is off by one rounding."""
    batch, _ = rollout(params, how)
    step = step_of(microbatches)
    state, metrics = step(state_of(params, 0.0), (how, 0.0), batch)
    assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == 0
    expected = -(batch["weights"] * batch["advantages"]).sum()
    assert abs(expected) > 1e-3
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5, atol=1e-6)
    assert metrics["grad_norm"] > 1e-3
    # and as long as the parameters stay, so do the ratios: one program scores the old and the new
    _, again = step(state, (how, 0.0), next_batch(batch, metrics))
    assert again["clip_ratio/low_mean"] == again["clip_ratio/high_mean"] == 0
    np.testing.assert_allclose(again["loss"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_the_sampler_and_the_trainer_agree_on_what_was_sampled(params, how):
    batch, out = rollout(params, how)
    assert len({*map(tuple, np.asarray(out.tokens).tolist())}) > PROMPTS
    assert len({*np.asarray(out.alive).sum(1).tolist()}) > 1
    _, metrics = step_of(1)(state_of(params, 0.0), (how, 0.2), batch)
    agreement = grpo.sampler_agreement(batch, metrics["logps"])
    assert agreement["sampling/sampling_logp_difference/max"] < 1e-5
    # the comparison is not blind: another distribution is another number
    other = how.replace(temperature=how.temperature * 1.5, top_k=VOCAB, top_p=1.0, min_p=0.0)
    _, metrics = step_of(1)(state_of(params, 0.0), (other, 0.2), batch)
    assert grpo.sampler_agreement(batch, metrics["logps"])["sampling/sampling_logp_difference/max"] > 1e-2


def test_ratios_are_1_where_the_distribution_depends_on_what_was_said(params):
    """The scorer works out of the row what the sampler knew of the tokens before; all options are on."""
    how = WAYS["all"].replace(
        min_length=3, end_tokens=jnp.array([END, 9]), repetition_penalty=1.3, frequency_penalty=0.2,
        presence_penalty=0.4,
    )  # fmt: skip
    batch, out = rollout(params, how)
    assert np.asarray(out.alive).sum(1).min() == 4 < LENGTH
    _, metrics = step_of(2)(state_of(params, 0.0), (how, 0.0), batch)
    assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == 0
    agreement = grpo.sampler_agreement(batch, metrics["logps"])
    assert agreement["sampling/sampling_logp_difference/max"] < 1e-5
    other = how.replace(repetition_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0, min_length=0)
    _, metrics = step_of(2)(state_of(params, 0.0), (other, 0.0), batch)
    assert grpo.sampler_agreement(batch, metrics["logps"])["sampling/sampling_logp_difference/max"] > 1e-2


@pytest.mark.parametrize("microbatches", [1, 2])
def test_the_second_update_compares_with_the_policy_that_sampled(params, microbatches):
    """A ratio that is 1 for ever never clips, and nothing in the loss would say so."""
    batch, _ = rollout(params, ALL)
    step = step_of(microbatches)
    state, first = step(state_of(params, 2.0), (ALL, 0.2), batch)
    state, second = step(state, (ALL, 0.2), next_batch(batch, first))
    mask = batch["mask"]
    ratio = np.exp(np.asarray(second["logps"]) - np.asarray(first["logps"]))[mask]
    gain, w = batch["advantages"][mask], batch["weights"][mask]
    assert (np.abs(ratio - 1) > 1e-3).mean() > 0.9
    low, high = (ratio < 0.8) & (gain < 0), (ratio > 1.2) & (gain > 0)
    np.testing.assert_allclose(second["clip_ratio/low_mean"], w[low].sum(), rtol=1e-5)
    np.testing.assert_allclose(second["clip_ratio/high_mean"], w[high].sum(), rtol=1e-5)
    assert min(w[low].sum(), w[high].sum()) > 0
    expected = -(w * np.minimum(ratio * gain, np.clip(ratio, 0.8, 1.2) * gain)).sum()
    np.testing.assert_allclose(second["loss"], expected, rtol=1e-4)


def test_an_id_is_what_it_is_even_where_it_also_fills(params):
    """The padding's id is an ordinary one here, and is sampled: within a completion it is a token."""
    for pad_token in range(VOCAB):
        batch, out = rollout(params, ALL, pad_token=pad_token)
        inside = np.asarray((out.tokens == pad_token) & out.alive)
        if pad_token not in (END, 9) and inside[:, :-1].any() and not np.asarray(out.alive).all():
            break
    else:
        pytest.fail("no id is sampled; take another seed")
    assert batch["mask"][:, 4:][inside].all()
    assert batch["seen"][:, 4:][inside].all()
    assert (batch["weights"][:, 4:][inside] > 0).all()
    _, metrics = step_of(1)(state_of(params, 0.0), (ALL, 0.0), batch)
    assert (np.asarray(metrics["logps"])[:, 4:][inside] < 0).all()
    assert grpo.sampler_agreement(batch, metrics["logps"])["sampling/sampling_logp_difference/max"] < 1e-5
    assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == 0


# ---- with a table of bigrams, where everything can be worked out by hand


def bigram(params, tokens, seen):
    """Logits that depend on the last token alone."""
    return params["table"][tokens], None


TABLE = np.random.default_rng(0).normal(size=(9, 9)).astype(np.float32)
REFERENCE = np.random.default_rng(1).normal(size=(9, 9)).astype(np.float32)
COMPLETIONS = Completions(
    tokens=np.array([[5, END, 0, 0], [0, 0, 1, 7], [END, 0, 0, 0], [1, 0, 8, END]], np.int32),
    logps=np.array([[-1, -2, 0, 0], [-1, -1, -2, -3], [-0.5, 0, 0, 0], [-1, -2, -3, -4]], np.float32),
    alive=np.array([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]], bool),
)
PROMPT = np.array([[0, 7], [2, END]], np.int32)
SEEN = np.array([[False, True], [True, True]])
REWARDS = np.array([[0.35, 1.0], [0.1, -0.4]], np.float32)


def batch_of(rewards=REWARDS, **options):
    return grpo.make_batch(PROMPT, SEEN, COMPLETIONS, rewards, **options)


def logps_by_hand(table, tokens, temperature=1.0):
    x = np.asarray(table, np.float64) / temperature
    x = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return np.concatenate([np.zeros((len(tokens), 1)), x[tokens[:, :-1], tokens[:, 1:]]], 1)


def loss_and_slopes(batch, how=None, table=TABLE, **options):
    loss_fn = grpo.make_loss(bigram, how=how, **options)
    both = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, metrics), slopes = both({"table": table}, None, batch, None)
    return loss, metrics, np.asarray(slopes["table"])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_at_ratio_1_the_gradient_is_that_of_the_policy_gradient(slope, temperature):
    batch = batch_of()
    _, _, got = loss_and_slopes(batch, how=Sampling(temperature=temperature))
    gain = batch["weights"].astype(np.float64) * batch["advantages"]
    surrogate = lambda table: -(gain * logps_by_hand(table, batch["tokens"], temperature)).sum()
    expected = slope(surrogate, TABLE)
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-7)


def test_the_loss_of_a_later_update_by_hand():
    """With its penalty, its clip of two bounds, and metrics, all in float64."""
    batch = batch_of() | {"fresh": np.zeros(4, bool)}
    reference = np.where(batch["mask"], logps_by_hand(REFERENCE, batch["tokens"]), np.nan)
    batch["ref_logps"] = reference.astype(np.float32)
    loss, metrics, _ = loss_and_slopes(batch, kl=0.3, clip_low=0.1, clip_high=0.5)
    mask, w, gain = batch["mask"], batch["weights"].astype(np.float64), batch["advantages"]
    now = logps_by_hand(TABLE, batch["tokens"])
    ratio = np.exp(now - batch["old_logps"])
    surrogate = -np.minimum(ratio * gain, np.clip(ratio, 0.9, 1.5) * gain)
    gap = np.where(mask, batch["ref_logps"] - now, 0)
    kl = (w * (np.exp(gap) - 1 - gap)).sum()
    np.testing.assert_allclose(loss, (w * surrogate).sum() + 0.3 * kl, rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(metrics["clip_ratio/low_mean"], w[(ratio < 0.9) & (gain < 0)].sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["clip_ratio/high_mean"], w[(ratio > 1.5) & (gain > 0)].sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["logps"], np.where(mask, now, 0), rtol=1e-5, atol=1e-6)
    x = TABLE.astype(np.float64) - np.log(np.exp(TABLE.astype(np.float64)).sum(-1, keepdims=True))
    entropy = (w[:, 1:] * -(np.exp(x) * x).sum(-1)[batch["tokens"][:, :-1]]).sum()
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-5)


def test_only_with_a_reference_there_is_a_kl():
    assert loss_and_slopes(batch_of())[1].keys() == {
        "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "logps"
    }  # fmt: skip
    assert "kl" in loss_and_slopes(batch_of() | {"ref_logps": batch_of()["old_logps"]})[1]


@pytest.mark.parametrize("how", [Sampling(0.7, top_k=2), Sampling(top_p=0.4), Sampling(0.7, min_p=0.5)])
def test_the_truncated_distribution_is_the_one_that_is_scored(how):
    """The likeliest answer was sampled; the prompt's own tokens are impossible and must not turn into a NaN."""
    likeliest = TABLE.argmax(-1)
    prompt = np.array([[0, TABLE[0].argmin()]] * 2)
    answer = likeliest[prompt[:, 1]][[0, 0, 1, 1], None].astype(np.int32)
    out = Completions(answer, np.zeros((4, 1), np.float32), np.ones((4, 1), bool))
    batch = grpo.make_batch(prompt.astype(np.int32), np.ones((2, 2), bool), out, REWARDS)
    loss, metrics, slopes = loss_and_slopes(batch | {"weights": batch["weights"] * [[1], [2], [3], [5]]}, how=how)
    full = logps_by_hand(TABLE, batch["tokens"], how.temperature)[:, 2]
    got = np.asarray(metrics["logps"])
    assert (got[:, 2] > full + 0.1).all()
    assert (got[:, :2] == 0).all()
    assert np.isfinite(loss)
    assert np.isfinite(slopes).all()


def test_the_penalty_pulls_towards_the_reference():
    """A k1 in the loss would have the right value and no pull."""
    batch = batch_of(np.ones((2, 2), np.float32))
    batch["ref_logps"] = logps_by_hand(REFERENCE, batch["tokens"]).astype(np.float32)
    step = jax.jit(jax.value_and_grad(grpo.make_loss(bigram, kl=1.0), has_aux=True))
    params, kls = {"table": TABLE}, []
    for _ in range(100):
        (_, metrics), slopes = step(params, None, batch, None)
        kls.append(float(metrics["kl"]))
        params = jax.tree.map(lambda p, g: p - 2.0 * g, params, slopes)
    assert kls[-1] < 0.05 * kls[0]
    assert np.abs(logps_by_hand(params["table"], batch["tokens"]) - batch["ref_logps"])[batch["mask"]].max() < 0.3


@pytest.mark.parametrize("reward", [0.0, 0.35, 1.0])
@pytest.mark.parametrize("advantage", [advantages.group_relative, advantages.group_centred])
def test_answers_that_did_equally_well_teach_nothing(reward, advantage):
    loss, _, slopes = loss_and_slopes(batch_of(np.full((2, 2), reward, np.float32), advantage=advantage))
    assert loss == 0
    assert (slopes == 0).all()


def test_a_better_answer_becomes_likelier_and_a_worse_one_less_likely():
    _, before, slopes = loss_and_slopes(batch_of())
    _, after, _ = loss_and_slopes(batch_of(), table=TABLE - 0.1 * slopes)
    gained = np.asarray(after["logps"]).sum(1) > np.asarray(before["logps"]).sum(1)
    assert gained.tolist() == [False, True, True, False]


# ---- the arrays of a batch


def test_the_arrays_of_the_sampler_are_those_of_the_trainer():
    batch = batch_of()
    np.testing.assert_array_equal(batch["tokens"], np.concatenate([PROMPT[[0, 0, 1, 1]], COMPLETIONS.tokens], 1))
    np.testing.assert_array_equal(batch["seen"], np.concatenate([SEEN[[0, 0, 1, 1]], COMPLETIONS.alive], 1))
    for name, x in (("mask", COMPLETIONS.alive), ("old_logps", COMPLETIONS.logps)):
        np.testing.assert_array_equal(batch[name][:, 2:], x)
        assert not batch[name][:, :2].any()
    assert batch["fresh"].all()
    assert batch["tokens"].dtype == np.int32
    assert {batch[k].dtype for k in ("weights", "advantages", "old_logps")} == {np.dtype(np.float32)}
    assert {x.shape for name, x in batch.items() if name != "fresh"} == {(4, 6)}
    assert batch["fresh"].shape == (4,)


def test_the_end_is_scored_with_its_advantage_and_what_comes_after_is_not():
    batch = batch_of()
    ends = (batch["tokens"] == END) & (np.arange(6) >= 2)  # another one is in a prompt
    assert ends.sum() == 3
    assert batch["mask"][ends].all()
    assert (batch["weights"][ends] > 0).all()
    np.testing.assert_allclose(batch["advantages"][ends], [-1, 1, -1], rtol=1e-3)
    assert batch["mask"].sum(1).tolist() == [2, 4, 1, 4]
    assert batch["weights"][~batch["mask"]].sum() == 0


def test_every_token_of_a_row_has_the_advantage_of_its_answer():
    batch = batch_of(np.array([[1, 3], [8, 4]], np.float32), advantage=advantages.group_centred)
    np.testing.assert_array_equal(batch["advantages"], np.broadcast_to([[-1], [1], [2], [-2]], (4, 6)))


def test_the_weights_are_made_over_the_whole_batch():
    mask = batch_of()["mask"]
    for rule in (weights.token_mean, weights.sequence_mean):
        np.testing.assert_array_equal(batch_of(weigh=rule)["weights"], rule(mask))
    np.testing.assert_array_equal(batch_of()["weights"], weights.token_mean(mask))


def test_an_answer_without_a_verdict_has_no_advantage_and_spoils_no_other():
    rewards = np.array([[0.35, np.nan, 1.0, 0.1], [1.0, 0.0, 0.0, 0.0]], np.float32)
    out = jax.tree.map(lambda x: np.concatenate([x, x]), COMPLETIONS)
    got = grpo.make_batch(PROMPT, SEEN, out, rewards)["advantages"][:, 0].reshape(2, 4)
    without = np.asarray(advantages.group_relative(rewards[:1, [0, 2, 3]]))
    assert got[0, 1] == 0
    np.testing.assert_allclose(got[0, [0, 2, 3]], without[0], rtol=1e-6)
    assert np.isfinite(got).all()
    loss, _, slopes = loss_and_slopes(grpo.make_batch(PROMPT, SEEN, out, rewards))
    assert np.isfinite(loss)
    assert np.isfinite(slopes).all()


def test_an_answer_is_judged_and_trained_under_its_own_prompt():
    """Prompts in another order give the same rows in another order; groups that got mixed would not."""
    rng = np.random.default_rng(0)
    P, G = 5, 3
    prompts = np.arange(P, dtype=np.int32)[:, None] * [[1, 1]] + 1
    seen, alive = np.ones((P, 2), bool), np.arange(4) < rng.integers(1, 5, (P * G, 1))
    tokens = (np.repeat(np.arange(P), G)[:, None] * 10 + np.tile(np.arange(G), P)[:, None]).astype(np.int32)
    out = Completions(np.where(alive, tokens, 0), -alive.astype(np.float32), alive)
    rewards = rng.normal(size=(P, G)).astype(np.float32) * (1 + np.arange(P)[:, None])
    batch = grpo.make_batch(prompts, seen, out, rewards)
    rows = batch["tokens"]
    assert ((rows[:, 2] // 10) + 1 == rows[:, 0]).all()
    centred = np.asarray(advantages.group_relative(rewards))
    np.testing.assert_array_equal(batch["advantages"][:, 0], centred[rows[:, 2] // 10, rows[:, 2] % 10])
    order = np.array([3, 0, 4, 2, 1])
    of_rows = (order[:, None] * G + np.arange(G)).reshape(-1)
    other = grpo.make_batch(prompts[order], seen, jax.tree.map(lambda x: x[of_rows], out), rewards[order])
    for name in batch:
        np.testing.assert_allclose(other[name], batch[name][of_rows], rtol=1e-6, err_msg=name)


# ---- what is said about the samples


def test_group_metrics_by_hand():
    rewards = np.array([[0.0, 1.0], [0.35, 0.35]], np.float32)
    assert grpo.group_metrics(rewards, COMPLETIONS, (END,)) == pytest.approx({
        "reward": 0.425,
        "reward_std": 0.25,
        "frac_reward_zero_std": 0.5,
        "completions/mean_length": 11 / 4,
        "completions/clipped_ratio": 0.25,  # the second has no end
    })  # fmt: skip


def test_group_metrics_of_answers_without_a_verdict():
    got = grpo.group_metrics(np.array([[0.0, np.nan], [1.0, 3.0]]), COMPLETIONS, (END, 7))
    assert got["reward"] == pytest.approx(4 / 3)
    assert got["reward_std"] == pytest.approx(0.5)
    assert got["completions/clipped_ratio"] == 0  # 7 ends it as well


def test_an_end_that_only_fills_ends_nothing():
    cut = COMPLETIONS.replace(tokens=np.where(COMPLETIONS.alive, 1, END).astype(np.int32))
    assert grpo.group_metrics(REWARDS, cut, (END,))["completions/clipped_ratio"] == 1


def test_the_agreement_is_that_of_scored_tokens():
    batch = batch_of()
    off = np.where(batch["mask"], 0, 1e9) + batch["old_logps"]
    off[1, 3] += 0.11
    off[3, 5] -= 0.22
    got = grpo.sampler_agreement(batch, off)
    assert got["sampling/sampling_logp_difference/max"] == pytest.approx(0.22)
    assert got["sampling/sampling_logp_difference/mean"] == pytest.approx(0.03)
    nothing = batch | {"mask": np.zeros_like(batch["mask"])}
    assert [*grpo.sampler_agreement(nothing, off).values()] == [0, 0]
