"""Direct preference optimisation."""

import jax.numpy as jnp
import numpy as np

from pt_jax import logps, weights
from pt_jax.losses import preference
from pt_jax.recipes import sft


def make_loss(apply, *, beta=0.1, label_smoothing=0.0):
    """DPO on pairs whose reference log-probabilities are in the batch.

    Args:
      apply: ``(params, tokens, seen) -> (logits, cache)``.
      beta: see ``losses.preference.dpo``.
      label_smoothing: see ``losses.preference.dpo``.

    Returns:
      A loss for ``make_train_step``. Its metrics are TRL's: ``rewards/chosen``, ``rewards/rejected``,
      ``rewards/margins``, ``rewards/accuracies`` (implicit rewards), ``logps/chosen``, ``logps/rejected``.
    """

    def loss_fn(params, frozen, batch, key):
        both = {k: jnp.concatenate([batch["chosen"][k], batch["rejected"][k]]) for k in ("tokens", "seen", "mask")}
        logits, _ = apply(params, both["tokens"], both["seen"])
        chosen, rejected = jnp.split(
            logps.sequence_logps(logps.token_logps(logits, both["tokens"]), both["mask"]), 2
        )
        references = batch["ref_chosen"], batch["ref_rejected"]
        per_pair = preference.dpo(chosen, rejected, *references, beta=beta, label_smoothing=label_smoothing)
        reward = [
            preference.implicit_reward(x, ref, beta=beta) for x, ref in zip((chosen, rejected), references)
        ]
        mean = lambda x: weights.weighted_sum(x, batch["weights"])
        metrics = {
            "rewards/chosen": mean(reward[0]),
            "rewards/rejected": mean(reward[1]),
            "rewards/margins": mean(reward[0] - reward[1]),
            "rewards/accuracies": mean((reward[0] > reward[1]).astype(jnp.float32)),
            "logps/chosen": mean(chosen),
            "logps/rejected": mean(rejected),
        }
        return mean(per_pair), metrics

    return loss_fn


def make_batch(pairs, ref_chosen, ref_rejected, *, pad_token: int, length: int) -> dict:
    """Pairs of examples and their reference log-probabilities as the arrays that the loss takes.

    Args:
      pairs: (chosen, rejected) examples of ``data.encode.preference``.
      ref_chosen, ref_rejected: [B] from ``reference_logps``.
      pad_token: fills short rows.
      length: padded length T.

    Returns:
      "chosen" and "rejected", each with tokens, seen and mask [B, T]; ref_chosen, ref_rejected and weights [B].
    """
    batch = {"ref_chosen": np.asarray(ref_chosen), "ref_rejected": np.asarray(ref_rejected)}
    for side, examples in zip(("chosen", "rejected"), zip(*pairs)):
        arrays = sft.make_batch(examples, pad_token=pad_token, length=length)
        batch[side] = {k: arrays[k] for k in ("tokens", "seen", "mask")}
    return batch | {"weights": np.asarray(weights.row_mean(jnp.ones(len(pairs), bool)))}


def reference_logps(score, params, examples, *, pad_token: int, length: int, rows: int) -> np.ndarray:
    """Summed log-probabilities of examples under the reference: [N] float32, once for a whole data set.

    Args:
      score: of ``make_score``.
      params: of the reference.
      examples: of ``data.encode``.
      pad_token: fills short rows.
      length: padded length T.
      rows: how many to score at a time.
    """
    out = []
    for i in range(0, len(examples), rows):
        part = list(examples[i : i + rows])
        filled = part + [part[-1]] * (rows - len(part))  # one shape, so one trace
        batch = sft.make_batch(filled, pad_token=pad_token, length=length)
        sums = logps.sequence_logps(score(params, batch["tokens"], batch["seen"]), jnp.asarray(batch["mask"]))
        out.append(np.asarray(sums)[: len(part)])
    return np.concatenate(out)
