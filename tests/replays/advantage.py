"""Families grpo_advantage, rloo_advantage and ppo."""

import jax
import jax.numpy as jnp
import numpy as np
from oracle import ignore, one_of

from pt_jax import advantages, divergences, logps, weights
from pt_jax.losses import value
from pt_jax.objectives import clipped, corrections

# What the sampler said when these families were recorded: TRL's function asks it, so the entries do not carry it.
# Nothing is computed from these ids; they are only padded, cut to ``completion_lengths`` and handed back.
PROMPTS = [[11, 12, 13]] * 4 + [[14, 15]] * 4 + [[16, 17, 18, 19]] * 4
COMPLETIONS = [
    [160, 138, 184, 77, 2],
    [98, 157, 2],
    [43, 61, 148, 64, 131, 62],
    [126, 2],
    [34, 149, 61, 71, 123, 140],
    [18, 102, 96, 13, 110, 162],
    [2],
    [115, 182, 150, 2],
    [38, 180, 2],
    [196, 38, 145, 102, 2],
    [57, 97, 35, 174, 53, 47],
    [86, 2],
]
PAD = 0


def _padded(rows, width, left=False):
    pad = lambda row: [PAD] * (width - len(row)) + row if left else row + [PAD] * (width - len(row))
    return np.array([pad(row) for row in rows])


def _sampled(options, inputs):
    """Prompts, completions and their masks; a truncated completion is masked whole if so asked."""
    mask, lengths = np.asarray(inputs["completion_mask"], bool), np.asarray(inputs["completion_lengths"])
    if not np.array_equal(mask, np.arange(mask.shape[1]) < lengths[:, None]):
        raise ValueError("completion_mask is not that of completion_lengths")
    prompts = _padded(PROMPTS, max(map(len, PROMPTS)), left=True)
    # -1, which is no token, where other lengths were sampled than those that we know the tokens of
    known = len(lengths) == len(COMPLETIONS) and all(len(row) == n for row, n in zip(COMPLETIONS, lengths))
    completions = _padded(COMPLETIONS, mask.shape[1]) if known else np.where(mask, -1, PAD)
    if options.get("mask_truncated_completions", False):
        mask = mask & ~np.asarray(inputs["is_truncated"], bool)[:, None]
    return mask, {
        "prompt_ids": prompts,
        "prompt_mask": prompts != PAD,
        "completion_ids": completions,
        "completion_mask": mask,
        "num_items_in_batch": mask.sum(),
    }


def _reward_terms(options, inputs):
    """[P, G, F] and [F], the rewards of the named functions and their weights."""
    columns = options["reward_cols"]
    terms = jnp.stack([jnp.asarray(inputs[name]) for name in columns], -1)
    given = options.get("reward_weights")
    given = [1.0] * len(columns) if given is None else given
    return terms.reshape(-1, options["num_generations"], len(columns)), jnp.asarray(given, terms.dtype)


def grpo_advantage(options, inputs, wanted):
    mask, out = _sampled(options, inputs)
    terms = _reward_terms(options, inputs)
    scale = options.get("scale_rewards", "group")
    by_scale = {
        "group": advantages.group_relative_trl,
        "batch": advantages.batch_normalised,
        "none": advantages.group_centred,
    }
    scale = {True: "group", False: "none"}.get(scale, scale)
    if scale not in by_scale:
        raise ValueError(f"scale_rewards is {scale!r}")
    aggregation = options.get("multi_objective_aggregation", "sum_then_normalize")
    if aggregation == "normalize_then_sum":  # whatever scale_rewards says
        out["advantages"] = advantages.per_reward_normalised(*terms).ravel()
    elif aggregation == "sum_then_normalize":
        out["advantages"] = by_scale[scale](advantages.summed_rewards(*terms)).ravel()
    else:
        raise ValueError(f"multi_objective_aggregation is {aggregation!r}")
    ignore(options, "beta")  # the penalty is the loss's; only whether the reference is scored depends on it
    names = [f"vllm_importance_sampling_{name}" for name in ("mode", "clip_min", "clip_max")]
    ignore(options, "nan_sampling_logp", *names)  # they speak of the correction alone
    if options.get("vllm_importance_sampling_correction", True):
        out |= _sampler_correction(options, inputs, mask)
    scored = {f"{of}_per_token_logps" for of in ("old", "sampling", "ref")}
    return out | {name: inputs[name] for name in scored}


def _sampler_correction(options, inputs, mask):
    """The ratio between trainer and sampler; in TRL it is 1 before treatment where nothing is scored."""
    names = ["mode", "clip_min", "clip_max"]
    defaults = {"mode": "sequence_mask", "clip_min": None, "clip_max": 3.0}
    mode, low, high = (options.get(f"vllm_importance_sampling_{name}", defaults[name]) for name in names)
    if mode not in {f"{level}_{treatment}" for level in ("token", "sequence") for treatment in ("mask", "truncate")}:
        raise ValueError(f"vllm_importance_sampling_mode is {mode!r}")
    old, sampled = (jnp.where(mask, inputs[f"{of}_per_token_logps"], 0) for of in ("old", "sampling"))
    if options.get("nan_sampling_logp", False):
        sampled = sampled.at[0, 1].set(jnp.nan)  # the token for which the recorded sampler gave none
    everywhere = jnp.ones_like(mask)
    ratio_of = corrections.token_ratio if mode.startswith("token") else corrections.sequence_ratio
    ratio = ratio_of(old, sampled, everywhere)
    high = np.inf if high is None else high
    if mode.endswith("mask"):
        ratio = corrections.within(ratio, everywhere, low=np.finfo(np.float32).tiny if low is None else low, high=high)
    else:
        ratio = jnp.maximum(corrections.truncated(ratio, everywhere, cap=high), 0 if low is None else low)
    return {"importance_sampling_ratio": ratio if mode.startswith("token") else ratio[:, :1]}


def rloo_advantage(options, inputs, wanted):
    mask, out = _sampled(options, inputs)
    ignore(options, "nan_sampling_logp")  # RLOO does not look at what the sampler thought
    rewards = advantages.summed_rewards(*_reward_terms(options, inputs))
    clip = options.get("reward_clip_range")
    if clip:
        rewards = jnp.clip(rewards, *clip)
    old_logps, ref_logps = (jnp.asarray(inputs[f"{of}_per_token_logps"]) for of in ("old", "ref"))
    penalised = advantages.kl_penalised_scores(rewards.ravel(), old_logps, ref_logps, mask, kl_coef=options["beta"])
    normalised = options.get("normalize_advantages", False)
    if normalised not in (True, False):
        raise ValueError(f"normalize_advantages is {normalised!r}")
    compare = advantages.leave_one_out_normalised if normalised else advantages.leave_one_out
    out["advantages"] = compare(penalised.reshape(rewards.shape)).ravel()
    out["old_logps"] = logps.sequence_logps(old_logps, mask)
    return out


INVALID_LOGP = 1.0  # what TRL's PPO writes where there is no token


def ppo(options, inputs, wanted):
    if "mask" in inputs:
        return {"out": _masked_whiten(inputs["values"], inputs["mask"], one_of(options, "shift_mean", {True, False}))}
    out = _ppo_rollout(options, inputs)
    return out | _ppo_update(options, inputs, out)


def _masked_whiten(x, mask, shift_mean):
    """Ours; and where nothing is scored, the same line drawn on, which nobody reads in TRL."""
    x, mask = jnp.asarray(x), jnp.asarray(mask, bool)
    whitened = (advantages.whiten if shift_mean else advantages.whiten_keeping_mean)(x, mask)
    mean, deviation = x[mask].mean(), jnp.sqrt(x[mask].var(ddof=1) + 1e-8)
    return jnp.where(mask, whitened, (x - mean) / deviation + (0 if shift_mean else mean))


def _ppo_rollout(options, inputs):
    """What TRL computes before its first update: rewards, advantages, returns."""
    tokens, stop = np.asarray(inputs["responses"]), options["stop_token_id"]
    after_stop = np.zeros_like(tokens, bool)
    if stop is not None:
        after_stop = np.cumsum(tokens == stop, 1) - (tokens == stop) > 0
    kept = np.where(after_stop, options["pad_token_id"], tokens)
    is_pad = kept == options["pad_token_id"]
    last = np.where(is_pad.any(1), is_pad.argmax(1), kept.shape[1]) - 1
    mask, mask_and_one = (np.arange(kept.shape[1]) <= last[:, None] + i for i in (0, 1))
    old, ref = (_logps(options, inputs[f"logits_{of}"], tokens) for of in ("old", "ref"))
    kl_of = {"k1": divergences.k1, "k3": divergences.k3}[one_of(options, "kl_estimator", {"k1", "k3"})]
    scores = jnp.asarray(inputs["scores"])
    penalty = options["missing_eos_penalty"]
    if penalty is not None and stop is None:
        raise ValueError("missing_eos_penalty asks for the end token, and stop_token_id is None")
    if penalty is not None:
        scores = scores - penalty * ~(kept == stop).any(1)
    values = jnp.where(mask_and_one, _responses(inputs, "values_full"), 0)
    # TRL lets the score fall one step after the last token, where there is room, on a value of its own
    cost = advantages.kl_penalised_rewards(0 * scores, old, ref, mask, kl_coef=options["kl_coef"], kl=kl_of)
    rewards = cost + advantages.score_at_end(scores, mask_and_one)
    if one_of(options, "whiten_rewards", {True, False}):
        rewards = advantages.whiten_keeping_mean(rewards, mask_and_one)
    gained, returns = advantages.gae(rewards, values, mask_and_one, gamma=options["gamma"], lam=options["lam"])
    return {
        "responses": tokens,
        "postprocessed_responses": kept,
        "sequence_lengths": last,
        "padding_mask": ~mask,
        "padding_mask_p1": ~mask_and_one,
        "logprobs": jnp.where(mask, old, INVALID_LOGP),
        "ref_logprobs": jnp.where(mask, ref, INVALID_LOGP),
        "values": values,
        "scores": scores,
        "kl": kl_of(old, ref, mask),
        "non_score_reward": cost,
        "rewards": rewards,
        "returns": returns,
        "advantages": advantages.whiten(gained, mask),
    }


def _ppo_update(options, inputs, rollout):
    """The losses of the first update and their gradients."""
    mask, mask_and_one = ~rollout["padding_mask"], ~rollout["padding_mask_p1"]
    new = jnp.where(mask, _logps(options, inputs["logits_new"], rollout["responses"]), INVALID_LOGP)
    predicted = jnp.where(mask_and_one, _responses(inputs, "vpred_full"), 0)
    old_values, clip_value = rollout["values"], options["cliprange_value"]
    ratio_clip = {"clip_low": options["cliprange"], "clip_high": options["cliprange"]}
    mean = lambda x, mask: weights.weighted_sum(x, weights.token_mean(mask))

    def total(new, predicted):
        policy = clipped.clipped_surrogate(new, rollout["logprobs"], rollout["advantages"], mask, **ratio_clip)
        critic = value.clipped_value_loss(predicted, old_values, rollout["returns"], mask_and_one, clip=clip_value)
        losses = mean(policy, mask), mean(critic, mask_and_one)
        return losses[0] + options["vf_coef"] * losses[1], losses

    (loss, (policy, critic)), slopes = jax.value_and_grad(total, (0, 1), has_aux=True)(new, predicted)
    clipped_away = value.value_clip_indicator(predicted, old_values, rollout["returns"], mask_and_one, clip=clip_value)
    return {
        "new_logprobs": new,
        "vpred": predicted,
        "vpredclipped": jnp.clip(predicted, old_values - clip_value, old_values + clip_value),
        "ratio": jnp.exp(new - rollout["logprobs"]),
        "pg_loss": policy,
        "vf_loss": critic,
        "vf_clipfrac": mean(clipped_away, mask_and_one),
        "loss": loss,
        "grad_new_logprobs": slopes[0],
        "grad_vpred": slopes[1],
    }


def _responses(inputs, name):
    """The critic's values of the responses: TRL reads the one before each token, as with logits."""
    start = int(inputs["context_length"]) - 1
    return jnp.asarray(inputs[name])[:, start:-1]


def _logps(options, logits, tokens):
    """Row t of these logits scores token t; ours, token t + 1."""
    logits = jnp.asarray(logits) / (options["temperature"] + 1e-7)
    tokens = jnp.pad(jnp.asarray(tokens), [(0, 0), (1, 0)])
    return logps.token_logps(jnp.pad(logits, [(0, 0), (0, 1), (0, 0)]), tokens)[:, 1:]
