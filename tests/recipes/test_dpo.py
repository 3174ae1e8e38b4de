import jax
import numpy as np
import pytest

from pt_jax.data.encode import Example
from pt_jax.recipes import dpo
from pt_jax.recipes.score import make_score
from pt_jax.sampling import Sampling

VOCAB, END, LENGTH = 9, 3, 8


def bigram(params, tokens, seen):
    """Logits that depend on the last token alone."""
    return params["table"][tokens], None


def table(seed):
    return {"table": np.random.default_rng(seed).normal(size=(VOCAB, VOCAB)).astype(np.float32) * 2}


POLICY, REFERENCE = table(0), table(1)


def example(prompt, answer):
    return Example(np.array(prompt + answer, np.int32), np.arange(len(prompt + answer)) >= len(prompt))


PAIRS = [
    (example([5, 7], [0, 2, END]), example([5, 7], [1, END])),
    (example([1], [4, 4, 4, 4, 6, END]), example([1], [END])),
    (example([2, END, 3], [0, END]), example([2, END, 3], [8, 8, 0, 0, END])),
]
score = make_score(bigram)


def nats(params, e):
    """log p of an example's answer in float64."""
    x = params["table"].astype(np.float64)
    logp = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return sum(logp[e.tokens[t - 1], e.tokens[t]] for t in range(1, len(e.tokens)) if e.mask[t])


def references(params=REFERENCE, pairs=PAIRS, rows=2, pad_token=0):
    how = {"pad_token": pad_token, "length": LENGTH, "rows": rows}
    return [dpo.reference_logps(score, params, side, **how) for side in zip(*pairs)]


def batch_of(params=REFERENCE, pad_token=0):
    return dpo.make_batch(PAIRS, *references(params), pad_token=pad_token, length=LENGTH)


loss_fn = jax.jit(dpo.make_loss(bigram, beta=0.3))
slopes = jax.jit(jax.grad(lambda params, batch: loss_fn(params, None, batch, None)[0]))


def by_hand(beta, smoothing, nll):
    sides = [[(nats(POLICY, e), nats(REFERENCE, e)) for e in side] for side in zip(*PAIRS)]
    rewards = [beta * np.array([policy - reference for policy, reference in side]) for side in sides]
    h = rewards[0] - rewards[1]
    log_sigmoid = lambda x: -np.log1p(np.exp(-x))
    nats_a_token = -sum(x for x, _ in sides[0]) / sum(pair[0].mask.sum() for pair in PAIRS)
    loss = np.mean(-(1 - smoothing) * log_sigmoid(h) - smoothing * log_sigmoid(-h)) + nll * nats_a_token
    return loss, {
        "rewards/chosen": rewards[0].mean(),
        "rewards/rejected": rewards[1].mean(),
        "rewards/margins": h.mean(),
        "rewards/accuracies": (h > 0).mean(),
        "logps/chosen": np.mean([x for x, _ in sides[0]]),
        "logps/rejected": np.mean([x for x, _ in sides[1]]),
        "nll_loss": nats_a_token,
    }


@pytest.mark.parametrize("pad_token", [0, END])
@pytest.mark.parametrize(("beta", "smoothing", "nll"), [(0.3, 0.0, 0.0), (0.1, 0.2, 0.7)])
def test_the_loss_and_its_metrics_by_hand(beta, smoothing, nll, pad_token):
    loss_fn = dpo.make_loss(bigram, beta=beta, label_smoothing=smoothing, nll=nll)
    loss, metrics = jax.jit(loss_fn)(POLICY, None, batch_of(pad_token=pad_token), None)
    expected_loss, expected = by_hand(beta, smoothing, nll)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert metrics.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, err_msg=name)
    assert 0 < expected["rewards/accuracies"] < 1


def test_a_policy_that_is_the_reference_pays_log_2():
    loss, metrics = loss_fn(POLICY, None, batch_of(POLICY), None)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    assert abs(metrics["rewards/margins"]) < 1e-5


def test_the_reference_is_scored_as_the_policy_is():
    """The same parameters must give the same numbers on both sides, or every margin has an offset."""
    batch, ref = batch_of(POLICY), references(POLICY)
    _, metrics = loss_fn(POLICY, None, batch, None)
    np.testing.assert_allclose(metrics["logps/chosen"], ref[0].mean(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(metrics["logps/rejected"], ref[1].mean(), rtol=0, atol=1e-5)
    for got, side in zip(ref, zip(*PAIRS)):
        np.testing.assert_allclose(got, [nats(POLICY, e) for e in side], rtol=1e-5)
        assert got.dtype == np.float32


@pytest.mark.parametrize("pad_token", [0, END])
@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_how_many_are_scored_at_a_time_changes_nothing(rows, pad_token):
    for got, expected in zip(references(rows=rows, pad_token=pad_token), references(rows=3)):
        assert got.shape == (3,)
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_temperature_is_of_the_scored_distribution():
    hot = make_score(bigram, Sampling(temperature=2.0))
    got = dpo.reference_logps(hot, POLICY, [PAIRS[0][0]], pad_token=0, length=LENGTH, rows=1)
    np.testing.assert_allclose(got, [nats({"table": POLICY["table"] / 2}, PAIRS[0][0])], rtol=1e-5)


def test_a_step_raises_what_is_preferred_and_lowers_the_other():
    batch = batch_of(POLICY)
    slope = slopes(POLICY, batch)["table"]
    moved = {"table": POLICY["table"] - 0.1 * slope}
    (before, was), (after, now) = (loss_fn(p, None, batch, None) for p in (POLICY, moved))
    assert after < before
    assert now["rewards/margins"] > was["rewards/margins"]


def test_empty_pairs_change_nothing():
    """Pairs that only fill a batch have weight 0; counted in the mean, each would pay its log 2."""
    batch = batch_of()
    rubbish = lambda path: np.nan if path[-1].key.startswith("ref") else 0
    fill = lambda path, x: np.pad(x, ((0, 2), (0, 0))[: x.ndim], constant_values=rubbish(path))
    more = jax.tree_util.tree_map_with_path(fill, batch)
    for got, expected in zip(*(jax.tree.leaves(loss_fn(POLICY, None, b, None)) for b in (more, batch))):
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_allclose(slopes(POLICY, more)["table"], slopes(POLICY, batch)["table"], rtol=1e-5, atol=1e-7)


def test_the_arrays_of_a_batch():
    batch = batch_of(pad_token=END)
    assert batch.keys() == {"chosen", "rejected", "ref_chosen", "ref_rejected", "weights"}
    np.testing.assert_allclose(batch["weights"], np.full(3, 1 / 3), rtol=1e-6)
    for i, side in enumerate(("chosen", "rejected")):
        names = ("tokens", "seen", "mask", "weights")
        assert {k: x.shape for k, x in batch[side].items()} == dict.fromkeys(names, (3, 8))
        np.testing.assert_array_equal(batch[side]["weights"] > 0, batch[side]["mask"])
        for row, pair in enumerate(PAIRS):
            n = len(pair[i].tokens)
            np.testing.assert_array_equal(batch[side]["tokens"][row, :n], pair[i].tokens)
            np.testing.assert_array_equal(batch[side]["mask"][row, :n], pair[i].mask)
            assert batch[side]["seen"][row].sum() == n
            assert not batch[side]["mask"][row, n:].any()
    np.testing.assert_array_equal([batch["ref_chosen"], batch["ref_rejected"]], references())
