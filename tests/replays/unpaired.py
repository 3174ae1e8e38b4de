"""TRL's losses without a reference, on single answers, and of reward models."""

import jax
import jax.numpy as jnp
import numpy as np
from oracle import one_of

from pt_jax import logps, weights
from pt_jax.losses import likelihood, reward_model
from pt_jax.losses.preference import paired, reference_free, unpaired

# ---- what several share


def differentiated(loss, *arrays):
    """Value and gradients, compiled; ``loss`` returns what is averaged and differentiated, and more outputs."""
    return jax.jit(jax.value_and_grad(loss, tuple(range(len(arrays))), has_aux=True))(*map(jnp.asarray, arrays))


def pairs_of_rows(inputs, columns):
    """Tokens, labels and attention of [chosen; rejected], filled up to the columns of the logits."""

    def both(name, fill):
        halves = [inputs[f"{side}_{name}"] for side in ("chosen", "rejected")]
        return np.concatenate([np.pad(x, ((0, 0), (0, columns - x.shape[1])), constant_values=fill) for x in halves])

    return both("input_ids", 0), both("labels", -100), both("attention_mask", 0)


def sums_and_lengths(x, mask):
    return logps.sequence_logps(x, mask), mask.sum(-1)


def mean_nll(x, mask):
    return weights.weighted_sum(likelihood.nll(x, mask), weights.token_mean(mask))


def without_first(mask):
    """Nothing predicts the first token, which TRL cuts off together with its mask."""
    return mask & (np.arange(mask.shape[1]) > 0)


# ---- CPO, SimPO, AlphaPO


def cpo(options, inputs, wanted):
    loss_type = one_of(options, "loss_type", ["sigmoid", "hinge", "ipo", "simpo", "alphapo"])
    nll_weight = options["cpo_alpha"]
    if loss_type == "alphapo":  # TRL's configuration rewrites it so
        loss_type, nll_weight = "simpo", 0.0
    beta, alpha = options["beta"], options["alpha"]
    smoothing = {"label_smoothing": options["label_smoothing"]}  # which hinge and ipo ignore in TRL
    gamma = options["simpo_gamma"]  # which all but simpo ignore
    averaged = loss_type in ("ipo", "simpo")

    def rewards(sums, lengths):
        return reference_free.alpha_reward(sums / lengths if averaged else sums, alpha=alpha)

    def losses(chosen, rejected, chosen_length, rejected_length):
        if loss_type == "simpo":
            lengths = chosen_length, rejected_length
            return reference_free.alphapo(chosen, rejected, *lengths, beta=beta, gamma=gamma, alpha=alpha, **smoothing)
        shaped = rewards(chosen, chosen_length), rewards(rejected, rejected_length)
        if loss_type == "ipo":
            return reference_free.cpo_ipo(*shaped, *[jnp.ones_like(chosen)] * 2, beta=beta)
        if loss_type == "hinge":
            return reference_free.cpo_hinge(*shaped, beta=beta)
        return reference_free.cpo(*shaped, beta=beta, **smoothing)

    if "chosen_logps" in inputs:
        one = np.ones_like(inputs["chosen_logps"])

        def of_logps(chosen, rejected):
            out = losses(chosen, rejected, one, one)
            return out.mean(), (out, beta * rewards(chosen, one), beta * rewards(rejected, one))

        (_, outputs), slopes = differentiated(of_logps, inputs["chosen_logps"], inputs["rejected_logps"])
        names = ["losses", "chosen_rewards", "rejected_rewards", "grad_chosen", "grad_rejected"]
        return dict(zip(names, (*outputs, *slopes)))

    tokens, labels, _ = pairs_of_rows(inputs, inputs["logits"].shape[1])
    mask, half = without_first(labels != -100), len(tokens) // 2

    def of_logits(logits):
        x = logps.token_logps(logits, tokens)
        sums, lengths = sums_and_lengths(x, mask)
        loss = losses(sums[:half], sums[half:], lengths[:half], lengths[half:]).mean()
        return loss + nll_weight * mean_nll(x[:half], mask[:half]), ()

    (loss, _), (slope,) = differentiated(of_logits, inputs["logits"])
    return {"loss": loss, "grad_logits": slope}


# ---- ORPO


def orpo(options, inputs, wanted):
    beta = options["beta"]  # the paper's lambda
    if "chosen_logps" in inputs:
        one = np.ones_like(inputs["chosen_logps"])

        def of_logps(chosen, rejected):
            loss = reference_free.orpo(chosen, rejected, one, one)
            odds = reference_free.log_odds(chosen) - reference_free.log_odds(rejected)
            # TRL's losses have the sign of a reward, and are subtracted from the likelihood's
            aux = -beta * loss, beta * chosen, beta * rejected, -loss.mean(), odds.mean()
            return beta * loss.mean(), aux

        (_, outputs), slopes = differentiated(of_logps, inputs["chosen_logps"], inputs["rejected_logps"])
        names = ["losses", "chosen_rewards", "rejected_rewards", "mean_ratio", "mean_log_odds"]
        return dict(zip([*names, "grad_chosen", "grad_rejected"], (*outputs, *slopes)))

    tokens, labels, seen = pairs_of_rows(inputs, inputs["logits"].shape[1])
    mask, half = without_first(labels != -100), len(tokens) // 2
    prompt_and_answer = without_first(seen[:half] == 1)

    def of_logits(logits):
        x = logps.token_logps(logits, tokens)
        sums, lengths = sums_and_lengths(x, mask)
        loss = reference_free.orpo(sums[:half], sums[half:], lengths[:half], lengths[half:]).mean()
        return mean_nll(x[:half], prompt_and_answer) + beta * loss, ()

    (loss, _), (slope,) = differentiated(of_logits, inputs["logits"])
    return {"loss": loss, "grad_logits": slope}


# ---- TPO


def tpo(options, inputs, wanted):
    loss_type = one_of(options, "loss_type", ["sigmoid", "hinge", "ipo", "tpo-l"])
    beta, nll_weight = options["beta"], options["tpo_alpha"]
    smoothing = {"label_smoothing": options["label_smoothing"]}  # which hinge and ipo ignore in TRL
    gamma = options["tpo_l_gamma"]  # which all but tpo-l ignore
    tokens, mask = inputs["input_ids"], without_first(inputs["completion_mask"] == 1)
    rows = len(tokens) // (3 if nll_weight else 2)  # without the likelihood there are no gold rows

    def of_logits(logits):
        x = logps.token_logps(logits, tokens)
        sums, lengths = sums_and_lengths(x, mask)
        chosen, rejected = sums[:rows], sums[rows : 2 * rows]
        lengths = lengths[:rows], lengths[rows : 2 * rows]
        if loss_type == "tpo-l":
            losses = reference_free.tpo_l(chosen, rejected, *lengths, beta=beta, gamma=gamma, **smoothing)
        elif loss_type == "ipo":
            losses = reference_free.cpo_ipo(chosen, rejected, *lengths, beta=beta)
        elif loss_type == "hinge":
            losses = reference_free.cpo_hinge(chosen, rejected, beta=beta)
        else:
            losses = reference_free.tpo(chosen, rejected, beta=beta, **smoothing)
        gold = mean_nll(x[2 * rows :], mask[2 * rows :]) if nll_weight else 0.0
        return losses.mean() + nll_weight * gold, ()

    (loss, _), (slope,) = differentiated(of_logits, inputs["logits"])
    return {"loss": loss, "grad_logits": slope}


# ---- KTO, APO-zero unpaired


def kto(options, inputs, wanted):
    loss_type = one_of(options, "loss_type", ["kto", "apo_zero_unpaired"])
    swapped = one_of(options, "kl_swapped", [True, False])
    desirable = np.asarray(options["labels"], bool)
    hyperparameters = {name: options[name] for name in ("beta", "desirable_weight", "undesirable_weight")}

    def summed(x):
        """TRL was handed zeros where nothing is scored and sums them too, so that its slope there is as elsewhere."""
        return logps.sequence_logps(x, np.ones(x.shape, bool))

    def mean(x):
        ref = summed(inputs["ref_per_token_logps"])
        if loss_type == "apo_zero_unpaired":
            return unpaired.apo_zero_unpaired(summed(x), ref, desirable, **hyperparameters).mean(), ()
        both = summed(inputs["KL_per_token_logps"]), summed(inputs["KL_ref_per_token_logps"])
        every = weights.row_mean(np.ones(len(both[0]), bool))
        kl, _ = unpaired.mismatched_kl(*(both[::-1] if swapped else both), every)
        return unpaired.kto(summed(x), ref, desirable, kl, **hyperparameters).mean(), ()

    (loss, _), (slope,) = differentiated(mean, inputs["per_token_logps"])
    return {"loss": loss, "grad_logps": slope}


# ---- BCO


def bco(options, inputs, wanted):
    beta = options["beta"]
    state, out = unpaired.RunningMean(), {}
    for step in range(len(inputs["chosen"])):
        policy, ref = (
            jnp.concatenate([inputs[f"{prefix}{side}"][step] for side in ("chosen", "rejected")])
            for prefix in ("", "ref_")
        )
        desirable = np.arange(len(policy)) < inputs["chosen"].shape[1]
        rewards = paired.implicit_reward(policy, ref, beta=beta)
        state = state.update(rewards, np.ones(len(policy), bool))
        losses = unpaired.bco(policy, ref, desirable, state.shift, beta=beta)
        out |= {f"losses_step{step}": losses, f"delta_step{step}": state.shift, f"loss_mean_step{step}": losses.mean()}
    return out


# ---- reward model


def reward(options, inputs, wanted):
    margin, coefficient = one_of(options, "use_margin", [True, False]), options["center_rewards_coefficient"]
    half = len(inputs["logits"]) // 2

    def mean(logits):
        chosen, rejected = logits[:half, 0], logits[half:, 0]
        if margin:
            loss = reward_model.bradley_terry_margin(chosen, rejected, inputs["margin"])
        else:
            loss = reward_model.bradley_terry(chosen, rejected)
        if coefficient is not None:
            loss += reward_model.centring(chosen, rejected, coefficient=coefficient)
        return loss.mean(), ()

    (loss, _), (slope,) = differentiated(mean, inputs["logits"])
    return {"loss": loss, "grad_logits": slope}
