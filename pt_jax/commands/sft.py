"""``pt-jax sft``: supervised fine-tuning, and pre-training on rows of text."""

import dataclasses
from typing import Literal

from pt_jax import weights
from pt_jax.commands import common, runs
from pt_jax.data import batches, encode
from pt_jax.recipes import sft as recipe

MEANS = {"token": weights.token_mean, "sequence": weights.sequence_mean}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFT(common.Training):
    """Supervised fine-tuning. Rows: prompt + completion, messages, or text (which is scored whole).

    Args:
      batch_size: rows an update.
      mean: every scored token weighs the same, or every sequence does.
      max_length: refuse rows of more tokens; the model's own limit when not given.
    """

    batch_size: int = 16
    mean: Literal["token", "sequence"] = "token"
    max_length: int | None = None


def run(options: SFT, tracker=None, stage: str = "sft") -> dict:
    """Trains and saves.

    Args:
      options: the command's.
      tracker: for metrics and progress; when None, a new one that logs into the folder at ``out``.
      stage: name of the stage in both.

    Returns:
      The metrics of the last step.
    """
    common.check_numbers(options, above_0=("max_length",))
    rows = common.check_options(options, kinds=("text", "messages", "completion"))
    model = common.open_model(options.model, options.quantize)
    examples = [encode.supervised(model.tokenizer, row) for row in rows]
    for example in examples:
        model.check_length(example.tokens, example.source, limit=options.max_length)
    fit = common.Fit(options, model, recipe.make_loss(model.apply), len(examples))
    length = batches.bucket(max(len(e.tokens) for e in examples))

    def batch_of_step(step):
        chosen = [examples[i] for i in fit.rows_of_step(step)]
        return recipe.make_batch(chosen, pad_token=model.pad_token, weigh=MEANS[options.mean], length=length)

    with runs.stage(options, stage, fit.steps, tracker) as (_, on, logs):
        fit.run(batch_of_step, on.step)
        fit.save(logs)
    return on.latest
