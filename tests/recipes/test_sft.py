import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax import weights
from pt_jax.data.encode import Example
from pt_jax.recipes import sft

VOCAB, END = 9, 3


def bigram(params, tokens, seen):
    """Logits that depend on the last token alone, so that what a token is predicted from is known."""
    return params["table"][tokens], None


PARAMS = {"table": np.random.default_rng(0).normal(size=(VOCAB, VOCAB)).astype(np.float32) * 2}


def example(tokens, scored):
    mask = np.arange(len(tokens)) >= len(tokens) - scored
    return Example(np.array(tokens, np.int32), mask)


# ragged; token 0 is scored; the third is scored from its first token on; ids repeat over the padding's
EXAMPLES = [
    example([5, 7, 0, 2, END], 3),
    example([1, 4, END], 1),
    example([6, 0, 8, 8, 2, 1, END], 7),
    example([2, END, 3, 5, END], 2),
]
RULES = {"token_mean": weights.token_mean, "sequence_mean": weights.sequence_mean}
loss_fn = jax.jit(sft.make_loss(bigram))
slopes = jax.jit(jax.grad(lambda params, batch: loss_fn(params, None, batch, None)[0]))


def by_hand(examples, rule):
    """Loss, entropy, accuracy and tokens in float64, token by token."""
    table = PARAMS["table"].astype(np.float64)
    logp = table - np.log(np.exp(table).sum(-1, keepdims=True))
    nll, entropy, hits = [], [], []
    for e in examples:
        places = [(e.tokens[t - 1], e.tokens[t]) for t in range(1, len(e.tokens)) if e.mask[t]]
        nll.append([-logp[a, b] for a, b in places])
        entropy.append([-(np.exp(logp[a]) * logp[a]).sum() for a, _ in places])
        hits.append([float(logp[a].argmax() == b) for a, b in places])
    mean = {
        "token_mean": lambda rows: np.mean([x for row in rows for x in row]),
        "sequence_mean": lambda rows: np.mean([np.mean(row) for row in rows]),
    }[rule]
    return mean(nll), mean(entropy), mean(hits), sum(map(len, nll))


@pytest.mark.parametrize("rule", RULES)
def test_the_loss_and_its_metrics_by_hand(rule):
    batch = sft.make_batch(EXAMPLES, pad_token=0, weigh=RULES[rule])
    loss, metrics = loss_fn(PARAMS, None, batch, None)
    expected = by_hand(EXAMPLES, rule)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    assert metrics.keys() == {"entropy", "mean_token_accuracy", "num_tokens"}
    np.testing.assert_allclose(metrics["entropy"], expected[1], rtol=1e-5)
    np.testing.assert_allclose(metrics["mean_token_accuracy"], expected[2], rtol=1e-5)
    assert metrics["num_tokens"] == expected[3] == 12
    assert 0 < expected[2] < 1


@pytest.mark.parametrize("pad_token", [0, END, 8])
def test_which_id_fills_the_rows_changes_nothing(pad_token):
    """Not even when it is the end's, or one that is scored elsewhere."""
    batch = sft.make_batch(EXAMPLES, pad_token=pad_token)
    assert (batch["tokens"] == pad_token).sum() >= 12
    loss, expected = loss_fn(PARAMS, None, batch, None)[0], by_hand(EXAMPLES, "token_mean")[0]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for i, e in enumerate(EXAMPLES):
        last = len(e.tokens) - 1
        assert batch["tokens"][i, last] == END
        assert batch["weights"][i, last] > 0
        assert not batch["seen"][i, last + 1 :].any()
        assert not batch["mask"][i, last + 1 :].any()


def test_the_longer_padding_changes_nothing():
    losses = [loss_fn(PARAMS, None, sft.make_batch(EXAMPLES, pad_token=1, length=n), None)[0] for n in (7, 30)]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_the_prompt_is_context_and_not_scored():
    batch = sft.make_batch(EXAMPLES[:1], pad_token=0)  # 5, 7 | 0, 2, END
    other = batch | {"tokens": np.where(np.arange(8)[None] == 0, 1, batch["tokens"])}
    np.testing.assert_array_equal(loss_fn(PARAMS, None, other, None)[0], loss_fn(PARAMS, None, batch, None)[0])
    got = np.abs(slopes(PARAMS, batch)["table"]).sum(-1) > 0
    assert np.flatnonzero(got).tolist() == [0, 2, 7]  # what the answer's tokens were predicted from


def test_a_token_is_predicted_from_the_one_before_it():
    """A model that is sure of a repetition: one step off, and the certain tokens would be the impossible ones."""
    sure = {"table": np.eye(VOCAB, dtype=np.float32) * 50}
    same, other = (sft.make_batch([example(x, 3)], pad_token=0) for x in ([4, 4, 4, 4], [4, 5, 6, 7]))
    loss, metrics = loss_fn(sure, None, same, None)
    np.testing.assert_allclose(loss, 0, atol=1e-6)
    assert metrics["mean_token_accuracy"] == 1
    loss, metrics = loss_fn(sure, None, other, None)
    np.testing.assert_allclose(loss, 50, rtol=1e-5)
    assert metrics["mean_token_accuracy"] == 0


def test_a_uniform_model_has_the_entropy_of_its_vocabulary():
    """Of a likelihood under the same name, this would be another number wherever the model is not uniform."""
    flat = {"table": np.zeros((VOCAB, VOCAB), np.float32)}
    loss, metrics = loss_fn(flat, None, sft.make_batch(EXAMPLES, pad_token=0), None)
    np.testing.assert_allclose([loss, metrics["entropy"]], np.log(VOCAB), rtol=1e-6)


def test_the_arrays_of_a_batch():
    batch = sft.make_batch(EXAMPLES, pad_token=END)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        "tokens": ((4, 8), np.int32),
        "seen": ((4, 8), bool),
        "mask": ((4, 8), bool),
        "weights": ((4, 8), np.float32),
    }
    for i, e in enumerate(EXAMPLES):
        np.testing.assert_array_equal(batch["tokens"][i, : len(e.tokens)], e.tokens)
        np.testing.assert_array_equal(batch["seen"][i], np.arange(8) < len(e.tokens))
        np.testing.assert_array_equal(batch["mask"][i, 1 : len(e.tokens)], e.mask[1:])
    assert not batch["mask"][:, 0].any()  # nothing predicts it, so it is not in the mean either
    np.testing.assert_array_equal(batch["weights"], weights.token_mean(jnp.asarray(batch["mask"])))
    assert EXAMPLES[2].mask[0]  # what is handed in stays as it was


def test_an_example_longer_than_the_length_is_refused():
    with pytest.raises(ValueError, match=r"row 2 has 7 tokens, more than the length of 6"):
        sft.make_batch(EXAMPLES, pad_token=0, length=6)
