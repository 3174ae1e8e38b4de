"""``DPOTrainer``: pairs of ids, any of its losses."""

import jax
import jax.numpy as jnp
import numpy as np
from end_to_end import Run, a_microbatch, dealt, reference_follows, same, value_of, windows

from pt_jax import logps, weights
from pt_jax.data import batches
from pt_jax.data.encode import Example
from pt_jax.losses import likelihood, preference
from pt_jax.recipes import dpo
from pt_jax.recipes.score import make_score
from replays import preference as families
from replays.sft_trainer import cut

FAR = 1e9  # larger than any log-ratio, and finite


def run(options, model, steps_of_log):
    options["loss_type"] = options.get("loss_type") or "sigmoid"
    method = _Method(families.dpo_options(options), value_of(options, "beta", 0.1), value_of(options, "ld_alpha", None))
    pairs = _pairs(options)
    updates = windows(len(pairs), options, steps_of_log)
    length = batches.bucket(max(len(e.tokens) for pair in pairs for e in pair))
    nothing = tuple(Example(e.tokens, np.zeros(len(e.tokens), bool)) for e in pairs[0])
    counts = [sum(len(e.tokens) for part in u for i in part for e in pairs[i]) for u in updates]
    score = make_score(model.apply)

    def feed(step, params, ref_params):
        dealt_rows, microbatches = dealt(updates[step]), len(updates[step])
        rows, there = (
            [nothing if i is None else pairs[i] for i in dealt_rows],
            np.array([i is not None for i in dealt_rows]),
        )
        zeros = np.zeros(len(rows), np.float32)
        batch = dpo.make_batch(rows, zeros, zeros, pad_token=model.pad_token, length=length)
        a_token = [score(ref_params, batch[s]["tokens"], batch[s]["seen"]) for s in ("chosen", "rejected")]
        batch["ref_chosen"], batch["ref_rejected"] = method.sums(a_token, batch)
        batch["weights"] = a_microbatch(weights.row_mean, microbatches)(there)
        batch["there"] = there
        # Before the first update the log-ratios are 0, and of two zeros none is larger. Log-probabilities of two
        # programs agree to rounding only, so those of the update itself are taken for both.
        batch["fresh"] = np.full(len(rows), same(params, ref_params))
        return batch, microbatches, {"num_tokens": float(sum(counts[: step + 1]))}

    return Run(make_loss(model.apply, method), len(updates), feed, reference_follows(options))


class _Method:
    """The options of a loss on pairs."""

    def __init__(self, of_losses, beta, ld_alpha):
        self.types, self.numbers, self.score, self.use_weighting = of_losses
        self.beta, self.ld_alpha = beta, ld_alpha
        self.is_recipe = self.types == [("sigmoid", 1.0)] and not (self.score or self.use_weighting or ld_alpha)

    def sums(self, a_token, batch):
        """[B] log-probabilities of the chosen and of the rejected answers."""
        masks = [batch[side]["mask"] for side in ("chosen", "rejected")]
        if self.ld_alpha is None:
            return [logps.sequence_logps(x, m) for x, m in zip(a_token, masks)]
        others = [m.sum(1) for m in reversed(masks)]
        return [preference.ld_sum(x, m, n, alpha=self.ld_alpha) for x, m, n in zip(a_token, masks, others)]

    def of_pairs(self, name, a_token, batch, pairs):
        """[B], one loss of those that are added up."""
        chosen_mask, rejected_mask = (batch[side]["mask"] for side in ("chosen", "rejected"))
        if name == "sft":
            nll = likelihood.nll(a_token[0], chosen_mask)
            return jnp.full(len(nll), weights.weighted_sum(nll, weights.token_mean(chosen_mask)))
        scored = {"score": self.score} if self.score else {}
        if name in families.OF_AVERAGES:
            lengths = chosen_mask.sum(1), rejected_mask.sum(1)
            return families.OF_AVERAGES[name](*pairs, *lengths, beta=self.beta, **scored)
        fn, read = (families.OF_MARGINS | families.OF_SINGLE_ANSWERS)[name]
        if name.startswith("aot"):
            # rows that only fill a microbatch become its last quantile, where their weight of 0 stands
            far = (FAR, FAR, 0.0, 0.0) if name == "aot_unpaired" else (FAR, 0.0, FAR, 0.0)
            pairs = [jnp.where(batch["there"], x, y) for x, y in zip(pairs, far)]
        return fn(*pairs, beta=self.beta, **{k: self.numbers[k] for k in read}, **scored)


def make_loss(apply, method):
    recipe = dpo.make_loss(apply, beta=method.beta)

    def loss_fn(params, frozen, batch, key):
        logits = [apply(params, batch[side]["tokens"], batch[side]["seen"])[0] for side in ("chosen", "rejected")]
        a_token = [logps.token_logps(x, batch[side]["tokens"]) for x, side in zip(logits, ("chosen", "rejected"))]
        now = method.sums(a_token, batch)
        given = batch["ref_chosen"], batch["ref_rejected"]
        references = [jnp.where(batch["fresh"], jax.lax.stop_gradient(x), y) for x, y in zip(now, given)]
        batch, pairs = batch | dict(zip(("ref_chosen", "ref_rejected"), references)), [*now, *references]
        if method.is_recipe:
            loss = recipe(params, frozen, batch, key)[0]
        else:
            weight = jnp.ones(len(batch["weights"]))
            if method.use_weighting:
                for z, x, side in zip(logits, a_token, ("chosen", "rejected")):
                    # log sum_v p_v^2, of the rows that the tokens come from
                    p2 = logps.align(jax.nn.logsumexp(2 * jax.nn.log_softmax(z[:, :-1]), -1))
                    weight = weight * preference.wpo_weights(x, p2, batch[side]["mask"])
            terms = [share * method.of_pairs(name, a_token, batch, pairs) for name, share in method.types]
            loss = weights.weighted_sum(sum(terms) * weight, batch["weights"])
        return loss, report(logits, pairs, batch, method.beta)

    return loss_fn


def report(logits, pairs, batch, beta):
    """What TRL logs of a microbatch, so weighted that the microbatches add up to their mean."""
    chosen, rejected, ref_chosen, ref_rejected = pairs
    mean = lambda x: weights.weighted_sum(x, batch["weights"])
    rewards = [preference.implicit_reward(*x, beta=beta) for x in ((chosen, ref_chosen), (rejected, ref_rejected))]
    share = batch["weights"].sum()  # one part in the number of microbatches
    sides = [batch["chosen"], batch["rejected"]]
    joined = jnp.concatenate([side["mask"] for side in sides])
    entropies = jnp.concatenate([logps.token_entropies(z) for z in logits])
    hits = logps.top_1_hits(logits[0], sides[0]["tokens"])
    a_token = lambda x, mask: share * weights.weighted_sum(x, weights.token_mean(mask))
    mean_logits = [a_token(logps.align(z[:, :-1].mean(-1)), side["mask"]) for z, side in zip(logits, sides)]
    return {
        "rewards/chosen": mean(rewards[0]),
        "rewards/rejected": mean(rewards[1]),
        "rewards/margins": mean(rewards[0] - rewards[1]),
        "rewards/accuracies": mean((rewards[0] > rewards[1]).astype(jnp.float32)),
        "logps/chosen": mean(chosen),
        "logps/rejected": mean(rejected),
        "logits/chosen": mean_logits[0],
        "logits/rejected": mean_logits[1],
        "entropy": a_token(entropies, joined),
        "mean_token_accuracy": a_token(hits, sides[0]["mask"]),
    }


def _pairs(options):
    """(chosen, rejected) examples, cut to a length; TRL leaves out those whose prompt fills it."""
    length, kept, out = value_of(options, "max_length", None, int), cut(options), []
    for row in options["rows"]:
        prompt = list(row["prompt_ids"])
        if length is not None and kept.start is None and len(prompt) >= length:
            continue
        answers = [list(row[f"{side}_ids"]) for side in ("chosen", "rejected")]
        masks = [np.arange(len(prompt) + len(x)) >= len(prompt) for x in answers]
        out.append(tuple(Example(np.array(prompt + x, np.int32)[kept], m[kept]) for x, m in zip(answers, masks)))
    return out
