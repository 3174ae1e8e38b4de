"""Direct preference optimisation."""

import jax.numpy as jnp
import numpy as np

from pt_jax import logps, weights
from pt_jax.data import packing
from pt_jax.losses import likelihood, preference
from pt_jax.recipes import sft
from pt_jax.training import distributed


def make_loss(apply, *, beta=0.1, label_smoothing=0.0, nll=0.0):
    """DPO on pairs whose reference log-probabilities are in the batch.

    Args:
      apply: ``(params, tokens, seen) -> (logits, cache)``.
      beta: see ``losses.preference.dpo``.
      label_smoothing: see ``losses.preference.dpo``.
      nll: weight of the chosen answers' mean negative log-likelihood a token, which is added. DPO alone only widens
        the gap between the two answers and may lower both; this holds the chosen one up. Pang et al. 2024,
        https://arxiv.org/abs/2404.19733, equation 1; 0.2 in Llama 3, https://arxiv.org/abs/2407.21783, section 4.1.4.

    Returns:
      A loss for ``make_train_step``. Its metrics are TRL's: ``rewards/chosen``, ``rewards/rejected``,
      ``rewards/margins``, ``rewards/accuracies`` (implicit rewards), ``logps/chosen``, ``logps/rejected``, and
      ``nll_loss`` of the chosen answers.
    """

    def loss_fn(params, frozen, batch, key):
        sides = _sides(apply, params, batch)
        return _loss(*sides.values(), batch, beta=beta, label_smoothing=label_smoothing, nll=nll)

    return loss_fn


def make_shared_loss(apply, *, beta=0.1, label_smoothing=0.0, nll=0.0):
    """The same on pairs whose prompt stands once in front of both answers: same loss, metrics and gradient.

    A pair of a prompt of P tokens and answers of n takes P + 2 n + 1 tokens, not 2 (P + n).

    Args:
      apply: as ``make_loss``; it must know rows of branches (``models.visibility``).
      beta, label_smoothing, nll: as ``make_loss``.

    Returns:
      A loss for ``make_train_step``, of batches of ``make_shared_batch``.
    """

    def loss_fn(params, frozen, batch, key):
        per_token = logps.token_logps(apply(params, batch["tokens"], batch["seen"])[0], batch["tokens"])
        return _loss(per_token, per_token, batch, beta=beta, label_smoothing=label_smoothing, nll=nll)

    return loss_fn


def against_reference(loss_fn, apply):
    """The same with the reference as a tree beside the batch, scored in the step: for one that moves (TR-DPO).

        step = make_train_step(dpo.against_reference(dpo.make_loss(apply), apply), optimizer,
                               frozen_of=references.beside, after=[references.follow(every=512, alpha=0.6)])

    Gorbatovski et al. 2024, https://arxiv.org/abs/2404.09656. It costs a forward pass of every pair a step.

    Args:
      loss_fn: of ``make_loss``.
      apply: of the reference.

    Returns:
      A loss of ``frozen`` = (reference, frozen of ``loss_fn``). ``ref_chosen`` and ``ref_rejected`` of the batch are
      replaced.
    """

    def loss_of_both(params, frozen, batch, key):
        reference, frozen = frozen
        sides = _sides(apply, reference, batch)
        known = {f"ref_{name}": logps.sequence_logps(sides[name], batch[name]["mask"]) for name in sides}
        return loss_fn(params, frozen, batch | known, key)

    return loss_of_both


def _sides(apply, params, batch) -> dict:
    """Log-probabilities of the tokens of chosen and rejected, [B, T] each."""
    # Each pair's two rows side by side: all chosen before all rejected would move rows between devices.
    join = lambda x, y: jnp.stack([x, y], 1).reshape(-1, *x.shape[1:])
    both = {k: join(batch["chosen"][k], batch["rejected"][k]) for k in ("tokens", "seen")}
    logits, _ = apply(params, both["tokens"], both["seen"])
    sides = logps.token_logps(logits, both["tokens"]).reshape(-1, 2, both["tokens"].shape[1])
    return {"chosen": sides[:, 0], "rejected": sides[:, 1]}


def _loss(of_chosen, of_rejected, batch, *, beta, label_smoothing, nll):
    """From the log-probabilities of tokens, [B, T], of which each side's mask says which are its answer's."""
    chosen = logps.sequence_logps(of_chosen, batch["chosen"]["mask"])
    rejected = logps.sequence_logps(of_rejected, batch["rejected"]["mask"])
    references = batch["ref_chosen"], batch["ref_rejected"]
    per_pair = preference.dpo(chosen, rejected, *references, beta=beta, label_smoothing=label_smoothing)
    reward = [preference.implicit_reward(x, ref, beta=beta) for x, ref in zip((chosen, rejected), references)]
    mean = lambda x: weights.weighted_sum(x, batch["weights"])
    metrics = {
        "rewards/chosen": mean(reward[0]),
        "rewards/rejected": mean(reward[1]),
        "rewards/margins": mean(reward[0] - reward[1]),
        "rewards/accuracies": mean((reward[0] > reward[1]).astype(jnp.float32)),
        "logps/chosen": mean(chosen),
        "logps/rejected": mean(rejected),
        "nll_loss": weights.weighted_sum(
            likelihood.nll(of_chosen, batch["chosen"]["mask"]), batch["chosen"]["weights"]
        ),
    }
    return mean(per_pair) + nll * metrics["nll_loss"], metrics


def make_batch(pairs, ref_chosen, ref_rejected, *, pad_token: int, length: int) -> dict:
    """Pairs of examples and their reference log-probabilities as the arrays that the loss takes.

    Args:
      pairs: (chosen, rejected) examples of ``data.encode.preference``.
      ref_chosen, ref_rejected: [B] from ``reference_logps``.
      pad_token: fills short rows.
      length: padded length T.

    Returns:
      "chosen" and "rejected", each with tokens, seen, mask and weights (of the tokens) [B, T]; ref_chosen, ref_rejected
      and weights (of the pairs) [B].
    """
    batch = {"ref_chosen": np.asarray(ref_chosen), "ref_rejected": np.asarray(ref_rejected)}
    for side, examples in zip(("chosen", "rejected"), zip(*pairs)):
        batch[side] = sft.make_batch(examples, pad_token=pad_token, length=length)
    return batch | {"weights": np.asarray(weights.row_mean(jnp.ones(len(pairs), bool)))}


def make_shared_batch(pairs, ref_chosen, ref_rejected, *, pad_token: int, length: int) -> dict:
    """The same for ``make_shared_loss``: a row [prompt | chosen | rejected] a pair.

    Args:
      pairs, ref_chosen, ref_rejected, pad_token: as ``make_batch``.
      length: T of a row; ``data.packing.shared_length`` says what a pair takes.

    Returns:
      tokens [B, T] and seen [B, T, 2]; "chosen" and "rejected", each with mask and weights (of the tokens) [B, T];
      ref_chosen, ref_rejected and weights (of the pairs) [B].
    """
    rows = packing.share(pairs, length=length, pad_token=pad_token)
    batch = {"tokens": rows.tokens, "seen": rows.seen}
    for branch, side in enumerate(("chosen", "rejected"), 1):
        mask = rows.mask & (rows.seen[..., 1] == branch)
        batch[side] = {"mask": mask, "weights": np.asarray(weights.token_mean(jnp.asarray(mask)))}
    batch |= {"ref_chosen": np.asarray(ref_chosen), "ref_rejected": np.asarray(ref_rejected)}
    return batch | {"weights": np.asarray(weights.row_mean(jnp.ones(len(pairs), bool)))}


def reference_logps(
    score, params, examples, *, pad_token: int, length: int, rows: int, place=lambda x: x
) -> np.ndarray:
    """Summed log-probabilities of examples under the reference: [N] float32, once for a whole data set.

    Args:
      score: of ``make_score``.
      params: of the reference.
      examples: of ``data.encode``.
      pad_token: fills short rows.
      length: padded length T.
      rows: how many to score at a time.
      place: puts a batch where its rows are scored (``sharding.place``).
    """
    out = []
    for i in range(0, len(examples), rows):
        part = list(examples[i : i + rows])
        filled = part + [part[-1]] * (rows - len(part))  # one shape, so one trace
        batch = place(sft.make_batch(filled, pad_token=pad_token, length=length))
        sums = logps.sequence_logps(score(params, batch["tokens"], batch["seen"]), jnp.asarray(batch["mask"]))
        out.append(distributed.fetched(sums)[: len(part)])
    return np.concatenate(out)
