"""Examples that share a row, and pairs that share a prompt, train as they do in rows of their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import jit

from pt_jax import models, weights
from pt_jax.data import packing
from pt_jax.data.encode import Example
from pt_jax.recipes import dpo, sft
from pt_jax.recipes.score import make_score

CONFIG = models.Config(
    vocab=31, layers=2, width=20, heads=6, kv_heads=2, head_width=4, hidden=18, windows=(5, 0), eps=1e-2, tied=False
)
APPLY = models.bind(CONFIG).apply
RNG = np.random.default_rng(0)
PARAMS = jax.tree_util.tree_map_with_path(
    lambda path, x: jnp.float32(path[-1].key.endswith("norm") + 0.3 * RNG.normal(size=x.shape)),
    jax.eval_shape(lambda: models.init(CONFIG, jax.random.key(0))),
)


def of_loss(loss_fn):
    """(batch) -> (loss, metrics), gradient."""
    compiled = jit(jax.value_and_grad(loss_fn, has_aux=True))
    return lambda batch: compiled(PARAMS, None, batch, None)


def example(n, scored):
    return Example(RNG.integers(0, 31, n).astype(np.int32), np.arange(n) >= n - scored)


def same(got, expected):
    ((loss, metrics), gradient), ((other, others), slope) = got, expected
    np.testing.assert_allclose(loss, other, rtol=1e-5)
    assert metrics.keys() == others.keys()
    for name in metrics:
        np.testing.assert_allclose(metrics[name], others[name], rtol=1e-5, atol=1e-6, err_msg=name)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(slope)):
        assert np.abs(b).max() > 1e-5
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


# ---- SFT

# scored from the first token on, scored in parts, long and short; the windows are shorter than most
EXAMPLES = [example(n, scored) for n, scored in [(9, 4), (3, 3), (14, 2), (1, 1), (6, 6), (12, 7), (5, 1)]]
supervised = of_loss(sft.make_loss(APPLY))
MEANS = {
    "token": weights.token_mean, "sequence": weights.sequence_mean,
    "constant": functools.partial(weights.constant_length, length=20),
}  # fmt: skip


@pytest.mark.parametrize("mean", MEANS)
def test_packed_examples_have_the_loss_the_metrics_and_the_gradient_of_examples_apart(mean):
    """A mean over the rows that examples share would be another number than one over the examples."""
    apart = sft.make_batch(EXAMPLES, pad_token=0, weigh=MEANS[mean], length=17)
    packed = sft.make_packed_batch(EXAMPLES, pad_token=0, weigh=MEANS[mean], length=17)
    assert len(packed["tokens"]) == 3 < len(apart["tokens"])
    same(supervised(packed), supervised(apart))
    if mean == "sequence":  # otherwise this test could not tell
        of_rows = MEANS[mean](jnp.asarray(packed["mask"]))
        assert abs(float(supervised(packed | {"weights": of_rows})[0][0] / supervised(packed)[0][0]) - 1) > 0.01


def test_rows_of_padding_and_microbatches_change_nothing():
    """Two rows and two rows, the last one empty, together give what three rows give."""
    of = functools.partial(sft.make_packed_batch, EXAMPLES, length=17, weigh=weights.sequence_mean)
    batch = of(pad_token=5, rows=4)
    parts = [supervised({k: x[i::2] for k, x in batch.items()}) for i in range(2)]
    assert not batch["seen"][3].any()
    same(jax.tree.map(jnp.add, *parts), supervised(of(pad_token=0)))


def test_packing_leaves_little_padding():
    """Lengths such as conversations have, most of them far below the longest: 99 of 100 numbers are tokens, not 20."""
    lengths = np.minimum(np.random.default_rng(1).lognormal(5, 0.8, 2000).astype(int) + 8, 1024)
    examples = [Example(np.zeros(n, np.int32), np.ones(n, bool)) for n in lengths]
    packed = packing.pack(examples, length=1024, pad_token=0)
    assert packed.filled > 0.99 and lengths.sum() / (2000 * lengths.max()) < 0.21


# ---- DPO


def pair(prompt, chosen, rejected):
    before = RNG.integers(0, 31, prompt)
    ids = [np.int32([*before, *RNG.integers(0, 31, n)]) for n in (chosen, rejected)]
    return tuple(Example(x, np.arange(len(x)) >= prompt) for x in ids)


PAIRS = [pair(9, 3, 5), pair(1, 6, 1), pair(4, 2, 2)]
score = make_score(APPLY)


def references():
    return [dpo.reference_logps(score, PARAMS, side, pad_token=0, length=16, rows=3) + 0.3 for side in zip(*PAIRS)]


def test_a_shared_prompt_has_the_loss_the_metrics_and_the_gradient_of_two_rows():
    how = {"beta": 0.3, "label_smoothing": 0.1, "nll": 0.4}
    refs = [ref + noise for ref, noise in zip(references(), RNG.normal(size=(2, 3)).astype(np.float32))]
    apart = dpo.make_batch(PAIRS, *refs, pad_token=0, length=16)
    shared = dpo.make_shared_batch(PAIRS, *refs, pad_token=3, length=19)
    same(of_loss(dpo.make_shared_loss(APPLY, **how))(shared), of_loss(dpo.make_loss(APPLY, **how))(apart))
    tokens = [packing.shared_length(p) for p in PAIRS]
    assert tokens == [9 + 3 + 5 + 1, 1 + 6 + 1 + 1, 4 + 2 + 2 + 1]  # of 2 (P + n)
    assert (shared["seen"][..., 0] > 0).sum() == sum(tokens) < sum(len(e.tokens) for p in PAIRS for e in p)


def test_a_prompt_with_a_group_of_answers_has_the_log_probabilities_of_rows_apart():
    """For a group of eight answers to a prompt of 40 tokens: 91 tokens instead of 364."""
    prompt = RNG.integers(0, 31, 40)
    group = [Example(np.int32([*prompt, *RNG.integers(0, 31, n)]), np.arange(40 + n) >= 40) for n in range(2, 10)]
    shared = packing.share([group], length=96, pad_token=0)
    assert packing.shared_length(group) == 39 + sum(range(2, 10)) + 8 == 91
    got = np.asarray(score(PARAMS, shared.tokens, shared.seen))
    apart = sft.make_batch(group, pad_token=0, length=56)
    expected = np.asarray(score(PARAMS, apart["tokens"], apart["seen"]))
    assert shared.mask.sum() == apart["mask"].sum() == sum(range(2, 10))
    for branch in range(8):
        mine = got[shared.mask & (shared.seen[..., 1] == branch + 1)]
        np.testing.assert_allclose(mine, expected[branch][apart["mask"][branch]], rtol=1e-5)
