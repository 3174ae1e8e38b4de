"""``pt-jax dpo``: direct preference optimisation."""

import dataclasses

import numpy as np

from pt_jax import checks
from pt_jax.commands import common, fitting
from pt_jax.data import batches, encode, packing
from pt_jax.recipes import dpo as recipe
from pt_jax.recipes.score import make_score
from pt_jax.training import references, sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPO(common.Training):
    """Direct preference optimisation against the model that it starts from. Rows: prompt + chosen + rejected.

    Args:
      batch_size: pairs an update.
      beta: larger keeps the policy nearer the reference.
      label_smoothing: share of the pairs believed to be labelled the wrong way round.
      nll: weight of the chosen answers' negative log-likelihood, which holds their probability up.
      sync_reference: updates after which the reference takes a step towards the policy each time (TR-DPO); it stays
        what it was when not given. It is then asked at every step.
      sync_alpha: how far it goes, of the whole way; 0.6 when not given.
      share_prompts: let the two answers of a pair share a row, in which their prompt stands once, so that less is
        computed; changes no result.
      max_length: refuse rows of more tokens; the model's own limit when not given.
    """

    learning_rate: float = 1e-5
    batch_size: int = 16
    beta: float = 0.1
    label_smoothing: float = 0.0
    nll: float = 0.0
    sync_reference: int | None = None
    sync_alpha: float | None = None
    share_prompts: bool = False
    max_length: int | None = None


def run(options: DPO, tracker=None, stage: str = "dpo") -> dict:
    """Trains and saves; see ``sft.run``. Warns when the chosen answers become less likely than they were.

    Returns:
      The metrics of the last step, and ``logps/chosen_before`` and ``logps/chosen_after``: the mean log-probability of
      all chosen answers of the data.
    """
    common.check_numbers(
        options, above_0=("beta", "max_length", "sync_reference", "sync_alpha"), at_least_0=("nll",),
        label_smoothing=(0.0, 0.5),
    )  # fmt: skip
    follow = follow_of(options)
    both = common.check_options(options, kinds=("preference",))
    model = common.open_to_train(options)
    pairs, held_out = ([encode.preference(model.tokenizer, row) for row in rows] for rows in both)
    for pair in (*pairs, *held_out):
        for example in pair:
            model.check_length(example.tokens, example.source, limit=options.max_length)
    make_loss, make_batch = recipe.make_loss, recipe.make_batch
    if options.share_prompts:
        make_loss, make_batch = recipe.make_shared_loss, recipe.make_shared_batch
    loss_fn = make_loss(model.apply, beta=options.beta, label_smoothing=options.label_smoothing, nll=options.nll)
    if follow is not None:
        loss_fn = recipe.against_reference(loss_fn, model.apply)
    fit = fitting.Fit(options, model, loss_fn, len(pairs), follow)
    if follow is not None and options.sync_reference > fit.updates:
        raise ValueError(f"--sync-reference {options.sync_reference}: the run has {fit.updates} updates; give fewer")
    score = make_score(sharding.within(fit.mesh, model.apply))

    def scored(examples, length):
        """Their log-probabilities under the model as it is now."""
        return recipe.reference_logps(
            score, fit.result_of(fit.state), examples, pad_token=model.pad_token, length=length,
            rows=options.batch_size, place=fit.place,
        )  # fmt: skip

    data = Pairs(pairs, scored, make_batch, options, model.pad_token)
    before = data.known[0] if follow is None else data.chosen()
    if held_out:
        fit.evaluate_loss(Pairs(held_out, scored, make_batch, options, model.pad_token)(np.arange(len(held_out))))

    with fit.stage(stage, tracker) as (tracker, on, logs):
        fit.run(lambda step: data(fit.rows_of_step(step)), on)
        before, after = float(before.mean()), float(data.chosen().mean())
        if after < before:
            tracker.warn(
                f"the chosen answers became less likely (log-probability {before:.2f} before, {after:.2f} after): the "
                "probability that the rejected ones lost went elsewhere; --nll 0.2 or fewer steps hold it"
            )
        fit.save(logs)
    return on.latest | {"logps/chosen_before": before, "logps/chosen_after": after}


class Pairs:
    """Pairs as batches, with what the reference says of them: the model before training, unless it is one that moves.

    Args:
      pairs: of ``encode.preference``.
      scored: ``(examples, length) -> log-probabilities`` under the model as it is when it is called.
      make_batch: of the recipe.
      options: the command's.
      pad_token: fills rows.
    """

    def __init__(self, pairs, scored, make_batch, options: DPO, pad_token: int):
        self.pairs, self.scored, self.make_batch = pairs, scored, make_batch
        self.width = batches.bucket(max(len(example.tokens) for pair in pairs for example in pair))
        length = batches.bucket(max(map(packing.shared_length, pairs))) if options.share_prompts else self.width
        self.how = {"pad_token": pad_token, "length": length}
        self.known = [np.zeros(len(pairs), np.float32)] * 2  # one that moves is asked in each step
        if options.sync_reference is None:
            self.known = [scored(side, self.width) for side in zip(*pairs)]

    def __call__(self, ids) -> dict:
        """The batch of some of them."""
        return self.make_batch([self.pairs[i] for i in ids], *(side[ids] for side in self.known), **self.how)

    def chosen(self):
        """The log-probabilities of the chosen answers under the model as it is now."""
        return self.scored([chosen for chosen, _ in self.pairs], self.width)


def follow_of(options: DPO):
    """How the reference follows the policy; None where it stays."""
    if options.sync_reference is None:
        if options.sync_alpha is not None:
            raise ValueError(f"--sync-alpha {options.sync_alpha} is of a reference that moves; give --sync-reference")
        return None
    if options.share_prompts:
        raise ValueError("--share-prompts is of a reference that stays; leave it out, or --sync-reference")
    if options.sync_alpha is None:
        return references.follow(every=options.sync_reference)
    checks.share("--sync-alpha", options.sync_alpha)
    return references.follow(every=options.sync_reference, alpha=options.sync_alpha)
