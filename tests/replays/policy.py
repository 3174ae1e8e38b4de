"""Families grpo, gspo_token, gmpo and rloo: TRL's policy losses, put together from the objectives and the weights."""

import jax
import jax.numpy as jnp
import numpy as np
from oracle import ignore, one_of

from pt_jax import divergences, objectives, weights

# TRL's own, for entries that do not write them down
DEFAULTS = {
    "loss_type": "dapo", "importance_sampling_level": "token", "beta": 0.0, "epsilon": 0.2, "epsilon_high": None,
    "delta": None, "use_bias_correction_kl": True, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None,
    "entropy_coef": 0.0, "sapo_temperature_neg": 1.05, "sapo_temperature_pos": 1.0, "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0, "max_completion_length": 512, "mode": "train",
    "steps_per_generation": 1, "gradient_accumulation_steps": 1, "current_gradient_accumulation_steps": 1,
    "use_old_per_token_logps": True, "use_tool_mask": False, "use_sampling_logps": False,
    "importance_sampling_ratio": None, "advantages_2d": False, "num_items_in_batch": None,
}  # fmt: skip
CLIPPED = {"grpo", "bnpo", "dr_grpo", "dapo", "luspo"}
LOSS_TYPES = CLIPPED | {"cispo", "sapo", "vespo"}
OF_SOME_LOSSES = [
    "epsilon", "epsilon_high", "delta", "sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos",
    "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "max_completion_length", "steps_per_generation",
    "num_items_in_batch", "use_bias_correction_kl",
]  # fmt: skip


def _fill_in(options):
    options.setdefault("current_gradient_accumulation_steps", options.get("gradient_accumulation_steps", 1))
    for name, value in DEFAULTS.items():
        options.setdefault(name, value)


def _switch(options, name):
    return one_of(options, name, {True, False})


# ---- what goes in


def _mask(options, inputs):
    mask = jnp.asarray(inputs["completion_mask"], bool)
    return mask & jnp.asarray(inputs["tool_mask"], bool) if _switch(options, "use_tool_mask") else mask


def _advantages(options, inputs):
    """[B, T]; where the tokens of a row differ, they go from half to one and a half of the row's."""
    advantages, columns = jnp.asarray(inputs["advantages"]), inputs["completion_mask"].shape[1]
    if advantages.ndim == 1:
        advantages = advantages[:, None]
    if _switch(options, "advantages_2d") and advantages.shape[1] == 1:
        return advantages * jnp.linspace(0.5, 1.5, columns, dtype=advantages.dtype)[None]
    return jnp.broadcast_to(advantages, (len(advantages), columns))


def _old(options, inputs, new):
    stored = _switch(options, "use_old_per_token_logps")
    return jnp.asarray(inputs["old_per_token_logps"]) if stored else jax.lax.stop_gradient(new)


def _correction(options, inputs):
    """The ratio of trainer and sampler, [B, T] or [B, 1], from the input that the option names."""
    ratios = {name for name in inputs if name.startswith("importance_sampling_ratio")}
    name = one_of(options, "importance_sampling_ratio", {None, *ratios})
    return None if name is None else jnp.asarray(inputs[name])


def _bounds(options):
    """An epsilon of 1 and more, DeepSeek-R1 has 10, leaves no bound below."""
    low, high = options["epsilon"], options["epsilon_high"]
    return {"clip_low": min(low, 1 - 1e-12), "clip_high": low if high is None else high}


# ---- a loss a token


def _clipped(options, new, old, advantages, mask, level, ratio):
    bounds, delta = _bounds(options), options["delta"]
    if delta is None:
        of = {"token": "clipped_surrogate", "sequence": "gspo", "sequence_token": "gspo_token"}[level]
        return getattr(objectives, of)(new, old, advantages, mask, **bounds)
    # TRL's delta bounds the branch without clip for both signs: above 1 + epsilon_high it is dual clipping's bound, and
    # below, it is the upper bound of good tokens, while bad ones stop at 1 + epsilon_high
    high = bounds.pop("clip_high")
    bounds |= {"clip_high": min(high, delta - 1), "clip_dual": max(high, delta - 1)}
    return objectives.dual_clip(*ratio, advantages, mask, **bounds)


def _cispo(options, new, old, advantages, mask, level, ratio):
    cap = _bounds(options)["clip_high"]  # TRL's bound is epsilon_high itself, not 1 + epsilon_high
    if level == "token":
        return objectives.cispo(new, old, advantages, mask, cap=cap)
    return objectives.reinforce(new, objectives.truncated(jnp.exp(ratio[0]), mask, cap=cap) * advantages, mask)


def _sapo(options, new, old, advantages, mask, level, ratio):
    temperatures = {f"temperature_{sign}": options[f"sapo_temperature_{sign}"] for sign in ("pos", "neg")}
    return objectives.sapo(*ratio, advantages, mask, **temperatures)


def _vespo_numbers(options):
    return {name: options[f"vespo_{name}"] for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")}


def _sampler_logps(old, mask, correction):
    """VESPO's ratio holds the correction. TRL adds it up over masked slots too; here it is spread over the others."""
    if correction is None:
        return old
    total = jnp.clip(jnp.log(correction), np.log(1e-8), 20).sum(-1, keepdims=True)
    return old - total / jnp.maximum(mask.sum(-1, keepdims=True), 1)


def _ratio(new, old, mask, level):
    """A new and an old log-probability a token whose difference is what TRL calls log_importance_weights."""
    hold = jax.lax.stop_gradient
    if level == "token":
        return new, old
    whole = objectives.sequence_log_ratio(new, old, mask)
    return (whole if level == "sequence" else hold(whole) + new - hold(new)), jnp.zeros_like(whole)


def _loss_per_token(options, inputs, new, entropies, advantages, mask, levels):
    """The loss [B, T], and which tokens the entropy lets in."""
    level, kind = one_of(options, "importance_sampling_level", levels), one_of(options, "loss_type", LOSS_TYPES)
    old, correction = _old(options, inputs, new), _correction(options, inputs)
    ratio = _ratio(new, old, mask, level)
    if kind == "vespo":
        old_of_sampler = _sampler_logps(old, mask, correction)
        loss = objectives.vespo(new, old_of_sampler, advantages, mask, **_vespo_numbers(options))
    else:
        of = {"cispo": _cispo, "sapo": _sapo}.get(kind, _clipped)
        loss = of(options, new, old, advantages, mask, level, ratio)
        loss = loss if correction is None else loss * correction
    sampled = jnp.asarray(inputs["sampling_per_token_logps"]) if _switch(options, "use_sampling_logps") else old
    if (threshold := options["off_policy_mask_threshold"]) is not None:
        loss = loss * objectives.off_policy_sequence_mask(new, sampled, advantages, mask, threshold=threshold)
    choice = _high_entropy(options, entropies, mask)
    loss = loss * choice
    if options["beta"]:
        kl = divergences.k3(new, jnp.asarray(inputs["ref_per_token_logps"]), mask)
        if _switch(options, "use_bias_correction_kl"):
            kl = objectives.importance_weighted(kl, *ratio, mask)
        loss = loss + options["beta"] * kl
    return loss, choice


def _high_entropy(options, entropies, mask):
    share = options["top_entropy_quantile"]
    if share >= 1:
        return mask
    return objectives.at_least(entropies, objectives.token_quantile(entropies, mask, quantile=1 - share), mask) != 0


# ---- means


def _steps(options):
    """What TRL divides the mean of a microbatch by."""
    ignore(options, "current_gradient_accumulation_steps")  # in evaluation nothing accumulates
    # TRL divides by that of the window under way; this is its usual value
    ignore(options, "gradient_accumulation_steps")
    return (
        options["current_gradient_accumulation_steps"] if one_of(options, "mode", {"train", "eval"}) == "train" else 1
    )


def _weights(options, mask):
    """TRL's reductions. Its means over rows count rows without a token, ours do not: hence the share."""
    kind, steps, share = options["loss_type"], _steps(options), mask.any(1).mean()
    if kind in ("grpo", "sapo"):
        return weights.sequence_mean(mask) * share / steps
    if kind == "bnpo":
        return weights.token_mean(mask) / steps
    if kind == "dr_grpo":
        return weights.constant_length(mask, length=options["max_completion_length"]) * share / steps
    if kind == "luspo":
        return weights.constant_length(mask, length=1) * share / steps
    tokens = options["num_items_in_batch"]  # of all the steps that the samples last for
    tokens = jnp.maximum(mask.sum() if tokens is None else tokens, 1)
    return mask / (tokens * (steps / options["steps_per_generation"] if options["mode"] == "train" else 1))


# ---- the families


def _policy(options, inputs, levels):
    _fill_in(options)
    mask, advantages = _mask(options, inputs), _advantages(options, inputs)

    def loss(new, entropies):
        per_token, choice = _loss_per_token(options, inputs, new, entropies, advantages, mask, levels)
        value = weights.weighted_sum(per_token, _weights(options, mask))
        bonus = objectives.entropy_bonus(entropies, mask, coef=options["entropy_coef"])
        return value + weights.weighted_sum(bonus, weights.token_mean(mask & choice)) / _steps(options)

    arguments = jnp.asarray(inputs["per_token_logps"]), jnp.asarray(inputs["entropies"])
    value, (of_logps, of_entropies) = jax.value_and_grad(loss, (0, 1))(*arguments)
    ignore(options, *OF_SOME_LOSSES)
    return {"loss": value, "grad_logps": of_logps, "grad_entropies": of_entropies, "advantages_2d": advantages}


def _row(per_token, mask, of_empty):
    """[B, 1] of what is the same at all scored tokens of a row."""
    return jnp.where(mask.any(1, keepdims=True), per_token.max(1, keepdims=True), of_empty)


def _kept(options, inputs):
    threshold, advantages = options["off_policy_threshold"], jnp.asarray(inputs["advantages"])
    mask, new = jnp.asarray(inputs["mask"], bool), jnp.asarray(inputs["per_token_logps"])
    sampled, bad = jnp.asarray(inputs["sampling_per_token_logps"]), -jnp.ones_like(new)
    near = objectives.off_policy_sequence_mask(new, sampled, bad, mask, threshold=threshold)
    return {"mask": (advantages >= 0) | (_row(near, mask, 1) != 0)}


def _gamma(options, inputs):
    _fill_in(options)
    with_is, advantages = _switch(options, "with_is"), jnp.asarray(inputs["advantages"])
    mask, log_ratio = jnp.asarray(inputs["mask"], bool), jnp.asarray(inputs["log_ratio_per_token"])
    correction = jnp.asarray(inputs["importance_sampling_ratio"]) if with_is else None
    old = _sampler_logps(jnp.zeros_like(log_ratio), mask, correction)
    of = lambda a: objectives.vespo_weights(log_ratio, old, a, mask, **_vespo_numbers(options))
    one = jnp.ones_like(log_ratio)
    phi = jnp.where(advantages >= 0, _row(of(one), mask, 1), _row(of(-one), mask, 1))
    ignore(options, *DEFAULTS)
    return {"phi": phi}


def _chosen(options, inputs):
    entropies, mask = jnp.asarray(inputs["entropies"]), jnp.asarray(inputs["mask"], bool)
    threshold = objectives.token_quantile(entropies, mask, quantile=options["threshold"])
    return {"mask": objectives.at_least(entropies, threshold, mask) != 0}


def grpo(options, inputs, wanted):
    # three of TRL's helpers are recorded by themselves
    for name, helper in {"off_policy_threshold": _kept, "with_is": _gamma, "threshold": _chosen}.items():
        if name in options:
            return helper(options, inputs)
    return _policy(options, inputs, {"token", "sequence"})


def gspo_token(options, inputs, wanted):
    return _policy(options, inputs, {"token", "sequence", "sequence_token"})


def gmpo(options, inputs, wanted):
    options.setdefault("epsilon", 0.4)
    _fill_in(options)
    mask, advantages = _mask(options, inputs), _advantages(options, inputs)
    one_of(options, "advantages_2d", {False})
    choice = mask & _high_entropy(options, jnp.asarray(inputs["entropies"]), mask)
    bounds = {"clip_low": options["epsilon"], "clip_high": options["epsilon_high"]}
    bounds["clip_high"] = bounds["clip_low"] if bounds["clip_high"] is None else bounds["clip_high"]

    def loss(new):
        old = _old(options, inputs, new)
        per_token, share = objectives.gmpo(new, old, advantages, choice, **bounds), choice.any(1).mean()
        value = weights.weighted_sum(per_token, weights.sequence_mean(choice)) * share
        # TRL counts a row without chosen tokens as one of ratio 1: a constant
        value = value - jnp.where(choice.any(1), 0, advantages[:, 0]).mean()
        if options["beta"]:
            kl = divergences.k3(new, jnp.asarray(inputs["ref_per_token_logps"]), mask)
            value += options["beta"] * weights.weighted_sum(kl, weights.sequence_mean(mask)) * mask.any(1).mean()
        return value / _steps(options)

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(inputs["per_token_logps"]))
    # GMPOTrainer has its own loss, which reads nothing else
    ignore(options, *OF_SOME_LOSSES, "loss_type", "importance_sampling_level", "off_policy_mask_threshold")
    ignore(options, "entropy_coef", "use_sampling_logps", "importance_sampling_ratio")
    return {"loss": value, "grad_logps": gradient}


def rloo(options, inputs, wanted):
    mask = jnp.asarray(inputs["completion_mask"], bool)
    advantages = jnp.broadcast_to(jnp.asarray(inputs["advantages"])[:, None], mask.shape)
    length, of_answers = mask.sum(1, keepdims=True), jnp.asarray(inputs["old_logps"])[:, None]
    old = jnp.broadcast_to(of_answers / jnp.maximum(length, 1), mask.shape)
    options.setdefault("epsilon_high", None)
    bounds = _bounds(options)

    def loss(new):
        per_token = objectives.rloo(new, old, advantages, mask, **bounds)
        value = weights.weighted_sum(per_token, weights.sequence_mean(mask)) * mask.any(1).mean()
        # TRL counts a row without tokens as one of ratio 1: a constant
        return value - jnp.where(mask.any(1), 0, advantages[:, 0]).mean()

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(inputs["per_token_logps"]))
    return {"loss": value, "grad_logps": gradient}
