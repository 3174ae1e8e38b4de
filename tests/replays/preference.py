"""TRL's losses with a reference, and its online methods, from ``pt_jax.losses.preference``.

Two habits of TRL show in what was recorded. Its log-probabilities are 0 where nothing is scored, and it sums them all:
so the gradient in such slots is that of a scored one, though it means nothing. And its masks stand on the tokens, its
log-probabilities one slot before.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from oracle import ignore, one_of

from pt_jax import divergences, logps, weights
from pt_jax.losses import likelihood, preference
from pt_jax.losses.preference import scores


def whole_sums(x):
    """Sums over rows as TRL takes them, over slots that hold 0 as well."""
    return logps.sequence_logps(x, jnp.ones(x.shape, bool))


def halves(x):
    """TRL's batch is [chosen; rejected]."""
    return x[: len(x) // 2], x[len(x) // 2 :]


def mean(x):
    return weights.weighted_sum(x, weights.row_mean(jnp.ones(len(x), bool)).astype(x.dtype))


def number(options, name, default):
    """An option that may be absent, or there as null."""
    value = options.get(name)
    return default if value is None else float(value)


# ---- DPO

# the arithmetic of each loss_type, and which numbers it reads beside beta
OF_MARGINS = {
    "sigmoid": (preference.dpo, []),  # TRL reads label_smoothing nowhere in this one
    "hinge": (preference.hinge, []),
    "robust": (preference.robust_dpo, ["label_smoothing"]),
    "exo_pair": (preference.exo, ["label_smoothing"]),
    "discopop": (preference.discopop, ["tau"]),
}
OF_AVERAGES = {"ipo": preference.ipo_norm, "sigmoid_norm": preference.dpo_norm}
OF_SINGLE_ANSWERS = {
    "nca_pair": (preference.nca, []),
    "bco_pair": (preference.bco_pair, []),
    "sppo_hard": (preference.sppo_hard, []),
    "apo_zero": (preference.apo_zero, []),
    "apo_down": (preference.apo_down, []),
    "aot": (preference.aot, ["label_smoothing"]),
    "aot_unpaired": (preference.aot_unpaired, ["label_smoothing"]),
}
LOSS_TYPES = {*OF_MARGINS, *OF_AVERAGES, *OF_SINGLE_ANSWERS, "sft"}


def divergence(options):
    """The score of f-DPO, or None for the reverse KL."""
    coefficient = number(options, "f_alpha_divergence_coef", 0.5)
    options = {"f_divergence_type": options.get("f_divergence_type") or "reverse_kl"}
    known = {
        "reverse_kl": None,
        "forward_kl": scores.forward_kl,
        "js_divergence": scores.jensen_shannon,
        "alpha_divergence": functools.partial(scores.alpha_divergence, alpha=1 - coefficient),
    }
    return known[one_of(options, "f_divergence_type", known)]


def dpo_options(options):
    """``[(loss_type, weight)]``, the numbers, and the score; what TRL refuses is refused."""
    types = options["loss_type"]
    types = [types] if isinstance(types, str) else list(types)
    for name in types:
        one_of({"loss_type": name}, "loss_type", LOSS_TYPES)
    loss_weights = options.get("loss_weights") or [1.0] * len(types)
    if len(loss_weights) != len(types):
        raise ValueError(f"loss_weights has {len(loss_weights)} numbers for {len(types)} types of loss")
    score = divergence(options)
    if score and {*types} & {*OF_SINGLE_ANSWERS}:
        raise ValueError(f"f_divergence_type is not defined for {sorted({*types} & {*OF_SINGLE_ANSWERS})}")
    use_weighting = one_of({"use_weighting": options.get("use_weighting") or False}, "use_weighting", [True, False])
    if use_weighting and {*types} & {"aot", "aot_unpaired"}:
        raise ValueError("use_weighting is not defined for a loss that sorts the batch")
    numbers = {
        "label_smoothing": number(options, "label_smoothing", 0.0),
        "tau": number(options, "discopop_tau", 0.05),
    }
    return list(zip(types, loss_weights)), numbers, score, use_weighting


def dpo_sums(x, mask, alpha):
    """Sums over rows, with the tail weighted by ``ld_alpha`` unless that is None."""
    if alpha is None:
        return whole_sums(x)
    length = mask.sum(1)
    other = jnp.concatenate(halves(length)[::-1])
    # for the gradient of slots that hold 0: TRL counts those after the end as copies of the last token
    scored_so_far = jnp.cumsum(mask, 1)
    tail = scored_so_far > jnp.minimum(length, other)[:, None]
    after = (scored_so_far > 0) & ~mask
    zeros = jnp.where(after, x, 0) * jnp.where(tail, alpha, 1.0).astype(x.dtype)
    return preference.ld_sum(x, mask, other, alpha=alpha) + zeros.sum(1)


def dpo(options, inputs, wanted):
    beta = number(options, "beta", 0.1)
    types, numbers, score, use_weighting = dpo_options(options)
    alpha = None if options.get("ld_alpha") is None else float(options["ld_alpha"])
    whole_mask = inputs["completion_mask"].astype(bool)
    mask = whole_mask[:, 1:]
    lengths = halves(whole_mask.sum(1))  # not shifted: TRL counts a scored first token here, and only here
    reference = halves(dpo_sums(jnp.asarray(inputs["ref_per_token_logps"]), mask, alpha))

    def of_pairs(name, x, pairs):
        if name == "sft":
            nll, chosen_mask = likelihood.nll(halves(x)[0], halves(mask)[0]), halves(mask)[0]
            nll = weights.weighted_sum(nll, weights.token_mean(chosen_mask).astype(nll.dtype))
            return jnp.full(len(chosen_mask), nll)
        scored = {"score": score} if score else {}
        if name in OF_AVERAGES:
            return OF_AVERAGES[name](*pairs, *lengths, beta=beta, **scored)
        fn, read = (OF_MARGINS | OF_SINGLE_ANSWERS)[name]
        return fn(*pairs, beta=beta, **{k: numbers[k] for k in read}, **scored)

    def loss(x):
        pairs = (*halves(dpo_sums(x, mask, alpha)), *reference)
        total = 0.0
        for name, weight in types:
            per_pair = of_pairs(name, x, pairs)
            if use_weighting:
                chosen, rejected = halves(preference.wpo_weights(x, inputs["log_sum_sq_probs"], mask))
                per_pair = per_pair * chosen * rejected
            total += weight * mean(per_pair)
        return total

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(inputs["per_token_logps"]))
    return {"loss": value, "grad_logps": gradient}


# ---- online


def first(value):
    """A schedule over epochs, of which the recorded step is in the first."""
    return float(value[0] if isinstance(value, (list, tuple)) else value)


def pair_loss(options):
    losses = {"sigmoid": preference.dpo, "ipo": preference.ipo}
    return losses[one_of({"loss_type": options.get("loss_type") or "sigmoid"}, "loss_type", losses)]


def online_dpo(options, inputs, wanted):
    beta, loss_of_pairs = first(options["beta"]), pair_loss(options)
    mask = inputs["completion_mask"].astype(bool)
    rewards = jnp.asarray(inputs["rewards"])
    penalty = options.get("missing_eos_penalty")
    if penalty is not None:
        rewards = rewards - jnp.where(inputs["contain_eos"], 0, penalty).astype(rewards.dtype)
    groups = lambda x: jnp.stack(halves(x), 1)  # the first answers to all prompts, then the second ones
    signs = preference.best_against_worst(groups(rewards))
    pair = lambda x: tuple(jnp.where(signs == sign, groups(x), 0).sum(1) for sign in (1, -1))
    reference = pair(logps.sequence_logps(jnp.asarray(inputs["ref_per_token_logps"]), mask))

    def loss(x):
        return mean(loss_of_pairs(*pair(logps.sequence_logps(x, mask)), *reference, beta=beta))

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(inputs["per_token_logps"]))
    return {"loss": value, "grad_logps": gradient}


def xpo(options, inputs, wanted):
    beta, alpha = first(options["beta"]), first(options["alpha"])
    loss_of_pairs = pair_loss(options)
    model_chosen = inputs["chosen_mask"].astype(bool)
    names = ("model_logprobs_model_data", "model_logprobs_ref_data")
    reference = [whole_sums(jnp.asarray(inputs[f"ref_logprobs_{data}_data"])) for data in ("model", "ref")]

    def pair(of_model, of_reference):
        return jnp.where(model_chosen, of_model, of_reference), jnp.where(model_chosen, of_reference, of_model)

    def loss(x):
        of_model, of_reference = (whole_sums(x[name]) for name in names)
        of_pairs = loss_of_pairs(*pair(of_model, of_reference), *pair(*reference), beta=beta)
        bonus = preference.xpo_bonus(of_reference, alpha=alpha)
        return mean(of_pairs + bonus), (of_pairs, bonus)

    x = {name: jnp.asarray(inputs[name]) for name in names}
    (value, (of_pairs, bonus)), gradient = jax.value_and_grad(loss, has_aux=True)(x)
    return {
        "loss": value,
        "dpo_losses": of_pairs,
        "xpo_losses": bonus,
        "grad_model_data": gradient[names[0]],
        "grad_ref_data": gradient[names[1]],
    }


def nash_md(options, inputs, wanted):
    beta = first(options["beta"])
    ref_logps, win_rates = jnp.asarray(inputs["ref_logprobs"]), jnp.asarray(inputs["probability"])
    everything = np.ones(ref_logps.shape, bool)

    def loss(x):
        per_row = whole_sums(preference.nash_md_token_kl(x, ref_logps, win_rates, everything, beta=beta))
        return mean(per_row)

    x = jnp.asarray(inputs["model_logprobs"])
    value, gradient = jax.value_and_grad(loss)(x)
    score = -preference.nash_md(whole_sums(x), whole_sums(ref_logps), win_rates, beta=0.0)
    kl = whole_sums(divergences.k1(x, ref_logps, everything))
    return {"loss": value, "score": score, "kl_div": kl, "grad_model": gradient}


def a2po(options, inputs, wanted):
    beta = number(options, "beta2", 1e-3)
    ignore(options, "beta1")  # TRL reads it before, where it makes v_star
    advantages = jnp.asarray(inputs["rewards"] - inputs["v_star"])

    def loss(x):
        return mean(preference.a2po(x, jnp.asarray(inputs["ref_logps"]), advantages, beta=beta))

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(inputs["policy_logps"]))
    return {"loss": value, "grad_logps": gradient}
