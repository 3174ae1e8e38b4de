"""``pt-jax dpo``: direct preference optimisation."""

import dataclasses

from pt_jax.commands import common, fitting
from pt_jax.data import batches, encode
from pt_jax.recipes import dpo as recipe
from pt_jax.recipes.score import make_score


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPO(common.Training):
    """Direct preference optimisation against the model that it starts from. Rows: prompt + chosen + rejected.

    Args:
      batch_size: pairs an update.
      beta: larger keeps the policy nearer the reference.
      label_smoothing: share of the pairs believed to be labelled the wrong way round.
      nll: weight of the chosen answers' negative log-likelihood, which holds their probability up.
      max_length: refuse rows of more tokens; the model's own limit when not given.
    """

    learning_rate: float = 1e-5
    batch_size: int = 16
    beta: float = 0.1
    label_smoothing: float = 0.0
    nll: float = 0.0
    max_length: int | None = None


def run(options: DPO, tracker=None, stage: str = "dpo") -> dict:
    """Trains and saves; see ``sft.run``. Warns when the chosen answers become less likely than they were.

    Returns:
      The metrics of the last step, and ``logps/chosen_before`` and ``logps/chosen_after``: the mean log-probability of
      all chosen answers of the data.
    """
    common.check_numbers(options, above_0=("beta", "max_length"), at_least_0=("nll",), label_smoothing=(0.0, 0.5))
    rows = common.check_options(options, kinds=("preference",))
    model = common.open_to_train(options)
    pairs = [encode.preference(model.tokenizer, row) for row in rows]
    for pair in pairs:
        for example in pair:
            model.check_length(example.tokens, example.source, limit=options.max_length)
    loss_fn = recipe.make_loss(model.apply, beta=options.beta, label_smoothing=options.label_smoothing, nll=options.nll)
    fit = fitting.Fit(options, model, loss_fn, len(pairs))
    length = batches.bucket(max(len(example.tokens) for pair in pairs for example in pair))
    score = make_score(model.apply)
    how = {"pad_token": model.pad_token, "length": length, "rows": options.batch_size}
    all_chosen, all_rejected = zip(*pairs)
    # the reference is the model before training, so its log-probabilities are worked out once
    of_reference = [recipe.reference_logps(score, model.params, side, **how) for side in (all_chosen, all_rejected)]

    def batch_of_step(step):
        ids = fit.rows_of_step(step)
        chosen = [pairs[i] for i in ids]
        references = (of_side[ids] for of_side in of_reference)
        return recipe.make_batch(chosen, *references, pad_token=model.pad_token, length=length)

    with fit.stage(stage, tracker) as (tracker, on, logs):
        fit.run(batch_of_step, on)
        scored = of_reference[0], recipe.reference_logps(score, fit.params, all_chosen, **how)
        before, after = (float(logps.mean()) for logps in scored)
        if after < before:
            tracker.warn(
                f"the chosen answers became less likely (log-probability {before:.2f} before, {after:.2f} after): the "
                "probability that the rejected ones lost went elsewhere; --nll 0.2 or fewer steps hold it"
            )
        fit.save(logs)
    return on.latest | {"logps/chosen_before": before, "logps/chosen_after": after}
