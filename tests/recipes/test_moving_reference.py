"""TR-DPO: the recipe with a reference in the state against the same with the reference's numbers made outside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax import logps, weights
from pt_jax.losses.preference import soft_update
from pt_jax.recipes import dpo
from pt_jax.training import init_state, make_train_step, optimizers, references

ROWS, COLUMNS, VOCAB = 4, 6, 7
LENGTHS = np.array([6, 3, 0, 5])  # of the chosen; one pair is empty
SGD = optimizers.sgd(0.5, clip=1e9)


def apply(params, tokens, seen):
    """A token says which comes next, and how many have been seen matters."""
    return params["table"][tokens] * jnp.cumsum(seen, 1)[..., None] / COLUMNS, None


def side(lengths, seed):
    rng = np.random.default_rng(seed)
    mask = (np.arange(COLUMNS) < lengths[:, None]) & (np.arange(COLUMNS) > 0)
    tokens = rng.integers(0, VOCAB, (ROWS, COLUMNS)).astype(np.int32)
    return {"tokens": tokens, "seen": mask | (np.arange(COLUMNS) == 0), "mask": mask,
            "weights": np.asarray(weights.token_mean(mask))}  # fmt: skip


def batch_of_step(i):
    real = LENGTHS > 0
    batch = {"chosen": side(LENGTHS, 2 * i), "rejected": side(LENGTHS[::-1] * real, 2 * i + 1)}
    return batch | {"weights": np.asarray(weights.row_mean(real))}


def new_params():
    return {"table": jnp.float32(np.random.default_rng(0).normal(size=(VOCAB, VOCAB)))}


@pytest.mark.parametrize("microbatches", [1, 2])
def test_the_reference_in_the_state_is_the_one_that_is_scored(microbatches):
    loss_fn = dpo.make_loss(apply, beta=0.7, nll=0.1)
    step = make_train_step(
        dpo.against_reference(loss_fn, apply), SGD, microbatches=microbatches, frozen_of=references.beside,
        after=[references.follow(every=2, alpha=0.6)],
    )  # fmt: skip
    by_hand = make_train_step(loss_fn, SGD)
    state, other = (init_state(new_params(), SGD, jax.random.key(0), reference=r) for r in (new_params(), None))
    reference, margins = new_params(), []
    for i in range(5):
        batch = batch_of_step(i)
        score = lambda side, reference=reference: logps.sequence_logps(
            logps.token_logps(apply(reference, side["tokens"], side["seen"])[0], side["tokens"]), side["mask"]
        )
        known = {f"ref_{name}": score(batch[name]) for name in ("chosen", "rejected")}
        state, metrics = step(state, None, batch)
        other, expected = by_hand(other, None, batch | known)
        if (i + 1) % 2 == 0:
            reference = soft_update(other.params, reference, alpha=0.6)
        for name in expected:
            np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name)
        margins.append(float(metrics["rewards/margins"]))
    np.testing.assert_allclose(state.params["table"], other.params["table"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.reference["table"], reference["table"], rtol=1e-5, atol=1e-6)
    assert margins[0] == 0 and min(map(abs, margins[1:])) > 1e-4
