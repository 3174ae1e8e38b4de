"""Supervised fine-tuning, and pre-training: they differ in which tokens the examples score."""

import jax.numpy as jnp
import numpy as np

from pt_jax import logps, weights
from pt_jax.data import batches, packing
from pt_jax.losses import likelihood


def make_loss(apply):
    """The negative log-likelihood of the scored tokens, as ``(params, frozen, batch, key) -> (loss, metrics)``.

    Args:
      apply: ``(params, tokens, seen) -> (logits, cache)``.

    Returns:
      A loss for ``make_train_step``. Its metrics, over the scored tokens with the loss's weights: ``entropy`` in nats,
      ``mean_token_accuracy`` (how often the likeliest token is the right one) and ``num_tokens``.
    """

    def loss_fn(params, frozen, batch, key):
        logits, _ = apply(params, batch["tokens"], batch["seen"])
        per_token = likelihood.nll(logps.token_logps(logits, batch["tokens"]), batch["mask"])
        mean = lambda x: weights.weighted_sum(x, batch["weights"])
        hit = logps.top_1_hits(logits, batch["tokens"])
        metrics = {
            "entropy": mean(logps.token_entropies(logits)),
            "mean_token_accuracy": mean(hit),
            "num_tokens": batch["mask"].sum(),
        }
        return mean(per_token), metrics

    return loss_fn


def make_batch(examples, *, pad_token: int, weigh=weights.token_mean, length: int | None = None) -> dict:
    """Examples as the arrays that the loss takes.

    Args:
      examples: of ``data.encode``.
      pad_token: fills short rows; it may be any id.
      weigh: mask -> weights, over the whole batch.
      length: padded length T; the bucket of the longest row when None.

    Returns:
      tokens, seen, mask and weights, each [B, T].
    """
    length = batches.bucket(max(len(e.tokens) for e in examples)) if length is None else length
    mask = batches.pad([e.mask for e in examples], length, False)
    mask[:, 0] = False  # nothing predicts a row's first token
    return {
        "tokens": batches.pad([e.tokens for e in examples], length, np.int32(pad_token)),
        "seen": batches.pad([np.ones(len(e.tokens), bool) for e in examples], length, False),
        "mask": mask,
        "weights": np.asarray(weigh(jnp.asarray(mask))),
    }


def make_packed_batch(
    examples, *, pad_token: int, length: int, rows: int | None = None, weigh=weights.token_mean
) -> dict:
    """The same, several examples a row: the same loss and gradient from fewer rows.

    What an example's tokens weigh is decided before it shares a row: a mean over sequences is one over examples.

    Args:
      examples: of ``data.encode``.
      pad_token: fills rows; it may be any id.
      length: T of a row.
      rows: R; as few as are needed when None.
      weigh: mask -> weights, over the whole batch.

    Returns:
      tokens, seen (int32, see ``models.visibility``), mask and weights, each [R, T].
    """
    apart = make_batch(examples, pad_token=pad_token, weigh=weigh, length=max(len(e.tokens) for e in examples))
    packed = packing.pack(examples, length=length, pad_token=pad_token, rows=rows)
    batch = {"tokens": packed.tokens, "seen": packed.seen, "mask": packed.mask}
    return batch | {"weights": packing.lay(apart["weights"], packed)}
