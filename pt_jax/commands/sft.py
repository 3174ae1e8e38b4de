"""``pt-jax sft``: supervised fine-tuning, and pre-training on rows of text."""

import dataclasses
from functools import partial
from typing import Literal

from pt_jax import weights
from pt_jax.commands import common, fitting
from pt_jax.data import batches, encode, packing
from pt_jax.recipes import sft as recipe

MEANS = {"token": weights.token_mean, "sequence": weights.sequence_mean}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFT(common.Training):
    """Supervised fine-tuning. Rows: prompt + completion, messages, or text (which is scored whole).

    Args:
      batch_size: rows an update.
      mean: every scored token weighs the same, or every sequence does.
      max_length: refuse rows of more tokens; the model's own limit when not given.
      packing: let texts share a row where they fit, so that less is computed for padding; changes no result.
    """

    batch_size: int = 16
    mean: Literal["token", "sequence"] = "token"
    max_length: int | None = None
    packing: bool = False


def run(options: SFT, tracker=None, stage: str = "sft") -> dict:
    """Trains and saves.

    Args:
      options: the command's.
      tracker: for metrics and progress; when None, a new one that logs into the folder at ``out``.
      stage: name of the stage in both.

    Returns:
      The metrics of the last step; with packing also ``packing/filled``, the share of all rows that was tokens.
    """
    common.check_numbers(options, above_0=("max_length",))
    data = common.check_options(options, kinds=("text", "messages", "completion"))
    model = common.open_to_train(options)
    examples, held_out = ([encode.supervised(model.tokenizer, row) for row in rows] for rows in data)
    for example in (*examples, *held_out):
        model.check_length(example.tokens, example.source, limit=options.max_length)
    fit = fitting.Fit(options, model, recipe.make_loss(model.apply), len(examples))
    length = batches.bucket(max(len(e.tokens) for e in examples))

    how = {"pad_token": model.pad_token, "weigh": MEANS[options.mean]}
    if held_out:
        fit.evaluate_loss(recipe.make_batch(held_out, **how))
    how["length"] = length
    make_batch, packed = recipe.make_batch, {}
    if options.packing:
        sizes = [[len(examples[i].tokens) for i in fit.rows_of_step(step)] for step in range(fit.steps)]
        most = max(len(packing.plan(lengths, length)) for lengths in sizes)
        count = -(-most // fit.parts) * fit.parts  # one shape for all steps, so one trace
        make_batch = partial(recipe.make_packed_batch, rows=count)
        packed = {"packing/filled": sum(map(sum, sizes)) / (fit.steps * count * length)}

    def batch_of_step(step):
        return make_batch([examples[i] for i in fit.rows_of_step(step)], **how)

    with fit.stage(stage, tracker) as (_, on, logs):
        fit.run(batch_of_step, on)
        fit.save(logs)
    return on.latest | packed
