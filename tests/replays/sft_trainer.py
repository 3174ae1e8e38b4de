"""``SFTTrainer``: rows of ids, of which those with a label are scored."""

import numpy as np
from end_to_end import Run, a_microbatch, dealt, value_of, windows
from oracle import one_of

from pt_jax import logps, weights
from pt_jax.data import batches
from pt_jax.data.encode import Example
from pt_jax.losses import likelihood
from pt_jax.recipes import sft

IGNORED = -100


def run(options, model, steps_of_log):
    kind = one_of({"loss_type": options.get("loss_type") or "nll"}, "loss_type", {"nll", "dft"})
    examples = _examples(options)
    updates = windows(len(examples), options, steps_of_log)
    length = batches.bucket(max(len(e.tokens) for e in examples))
    nothing = Example(examples[0].tokens, np.zeros(len(examples[0].tokens), bool))
    token_counts = np.cumsum([sum(len(examples[i].tokens) for part in u for i in part) for u in updates])

    def feed(step, params, ref_params):
        rows = [nothing if i is None else examples[i] for i in dealt(updates[step])]
        # the labels of all microbatches of an update are counted together: our mean over tokens
        batch = sft.make_batch(rows, pad_token=model.pad_token, length=length)
        microbatches = len(updates[step])
        # but what is logged is the mean of the microbatches' means
        batch["logged"] = a_microbatch(weights.token_mean, microbatches)(batch["mask"])
        return batch, microbatches, {"num_tokens": float(token_counts[step])}

    return Run(make_loss(model.apply, kind), len(updates), feed)


def make_loss(apply, kind):
    recipe = sft.make_loss(apply)

    def loss_fn(params, frozen, batch, key):
        if kind == "nll":
            loss, _ = recipe(params, frozen, batch, key)
        else:
            logits, _ = apply(params, batch["tokens"], batch["seen"])
            per_token = likelihood.dft(logps.token_logps(logits, batch["tokens"]), batch["mask"])
            loss = weights.weighted_sum(per_token, batch["weights"])
        metrics = recipe(params, frozen, batch | {"weights": batch["logged"]}, key)[1]
        return loss, {name: metrics[name] for name in ("entropy", "mean_token_accuracy")}

    return loss_fn


def _examples(options):
    """What TRL makes of the rows: labels from masks if there are none, cut to a length, none without a label."""
    rows = [_whole(row) for row in options.get("rows") or []]
    column = lambda name: options.get(f"rows_{name}") or [r[name] for r in rows if name in r] or None
    ids, labels = column("input_ids"), column("labels")
    masks = {name: column(name) for name in ("completion_mask", "assistant_masks")}
    only_completion = options.get("completion_only_loss")
    if only_completion is None:
        only_completion = any("prompt_ids" in row for row in rows)
    options.get("assistant_only_loss")  # where the masks come from; they are in the rows
    if labels is None:
        given = [m for name, m in masks.items() if m and (name == "assistant_masks" or only_completion)]
        labels = [[t if all(b) else IGNORED for t, *b in zip(*row)] for row in zip(ids, *given)]
    kept = cut(options)
    pairs = [(np.asarray(t, np.int32)[kept], np.asarray(x)[kept] != IGNORED) for t, x in zip(ids, labels, strict=True)]
    examples = [Example(tokens, mask) for tokens, mask in pairs if mask.any()]
    if not examples:
        raise ValueError("no row has a label")
    return examples


def _whole(row):
    """A row of a prompt and a completion as one of ids and a mask."""
    if "prompt_ids" not in row:
        return row
    prompt, completion = list(row["prompt_ids"]), list(row["completion_ids"])
    mask = [0] * len(prompt) + [1] * len(completion)
    return row | {"input_ids": prompt + completion, "completion_mask": mask}


def cut(options):
    """The slice of a row that ``max_length`` leaves."""
    length = value_of(options, "max_length", None, int)
    mode = {"truncation_mode": options.get("truncation_mode") or "keep_start"}
    from_start = one_of(mode, "truncation_mode", {"keep_start", "keep_end"}) == "keep_start"
    return slice(None) if length is None else slice(length) if from_start else slice(-length, None)
