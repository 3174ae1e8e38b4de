"""``GRPOTrainer`` with completions and rewards that are given: any of its losses."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from end_to_end import Run, a_microbatch, number_of_steps, reference_follows, value_of
from oracle import Options, ignore, one_of

from pt_jax import advantages, divergences, logps, objectives, weights
from pt_jax.recipes import grpo
from pt_jax.recipes.score import make_score
from pt_jax.sampling import Completions, Sampling, transform
from replays import policy

# of sampling, and the completions are there already
OF_SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs", "max_prompt_length")
# GRPOConfig's, where they differ from those that the recorded losses were computed with
DEFAULTS = {"use_bias_correction_kl": True, "max_completion_length": 512}


def run(options, model, steps_of_log):
    schedule = _schedule(options)
    method = _method(options, schedule)
    how = Sampling(temperature=value_of(options, "temperature", 1.0))
    generate = _rollouts(options, model, schedule, method)
    an_epoch = max(1, len(options["completions"]) // (schedule.rows * schedule.a_generation)) * schedule.generate_every
    if "num_train_epochs" not in options:
        options["num_train_epochs"] = 3  # transformers' default, and what was recorded
    steps = number_of_steps(options, math.ceil(an_epoch / schedule.a_step), steps_of_log)
    score = make_score(model.apply, how)
    kept, num_tokens = {}, 0  # generation -> its batch

    def begin(generation, params, ref_params):
        batch, metrics = generate(generation)
        if not schedule.on_policy:
            batch["old_logps"] = np.asarray(score(params, batch["tokens"], batch["seen"]))
            batch["fresh"] = np.zeros(len(batch["fresh"]), bool)
        if method["beta"]:
            batch["ref_logps"] = np.asarray(score(ref_params, batch["tokens"], batch["seen"]))
        kept[generation] = batch
        return metrics

    def feed(step, params, ref_params):
        nonlocal num_tokens
        parts = [schedule.part(m) for m in range(step * schedule.a_step, (step + 1) * schedule.a_step)]
        generations = sorted({generation for generation, _ in parts})
        known = [begin(g, params, ref_params) for g in generations if g not in kept]
        for old in kept.keys() - set(generations):
            del kept[old]
        num_tokens += sum(metrics.pop("num_tokens") for metrics in known)
        means = {name: float(np.mean([metrics[name] for metrics in known])) for name in (known[0] if known else ())}
        batch = _in_turn([{name: x[rows] for name, x in kept[g].items()} for g, rows in parts])
        # what is logged is the mean of the microbatches' means over tokens, or over answers
        batch["logged"] = a_microbatch(weights.token_mean, len(parts))(batch["mask"])
        batch["logged_answers"] = a_microbatch(_a_row, len(parts))(batch["mask"])
        return batch, len(parts), means | ({"num_tokens": float(num_tokens)} if known else {})

    return Run(make_loss(model.apply, how, method), steps, feed, reference_follows(options))


def _in_turn(parts):
    """Microbatches as ``make_train_step`` deals them: row j of part m stands at j * M + m."""
    return jax.tree.map(lambda *x: np.stack(x, 1).reshape(-1, *x[0].shape[1:]), *parts)


# ---- what is generated when


@dataclasses.dataclass(frozen=True)
class Schedule:
    """rows: of a microbatch. a_step: microbatches an update. a_generation: microbatches that a generation is cut into.
    times: how often a generation is gone through.
    """

    rows: int
    a_step: int
    a_generation: int
    times: int

    @property
    def generate_every(self):
        return self.a_generation * self.times

    @property
    def on_policy(self):
        """Whether a generation is used up within the update that it was made for."""
        return self.a_step % self.generate_every == 0

    def part(self, microbatch):
        """Of which generation the microbatch of this number is, and which rows of it."""
        start = microbatch % self.a_generation * self.rows
        return microbatch // self.generate_every, slice(start, start + self.rows)


def _schedule(options) -> Schedule:
    there = len(options["completions"])
    a_step = value_of(options, "gradient_accumulation_steps", 1, int)
    times = value_of(options, "num_iterations", 1, int)
    rows = value_of(options, "per_device_train_batch_size", None, int)
    generated = value_of(options, "generation_batch_size", None, int)
    a_generation = value_of(options, "steps_per_generation", None, int)
    if generated is not None and a_generation is not None:
        raise ValueError("generation_batch_size and steps_per_generation are both given; TRL takes one of them")
    if a_generation is None and generated is not None and rows is not None:
        a_generation = generated // rows
    a_generation = a_step if a_generation is None else a_generation
    rows = (generated or there) // a_generation if rows is None else rows
    generated = rows * a_generation
    group = value_of(options, "num_generations", 8, int)
    if generated % group or (there % generated and generated % there):
        raise ValueError(
            f"a generation of {a_generation} microbatches of {rows} rows does not fit groups of {group} and "
            f"{there} completions"
        )
    return Schedule(rows, a_step, a_generation, times)


def _rollouts(options, model, schedule, method):
    """``generation -> (batch, metrics)``: the completions in their order, from the first again after the last."""
    ignore(options, *OF_SAMPLING)
    group = value_of(options, "num_generations", 8, int)
    rows, rewards = options["completions"], _rewards(options)
    if len(rows) != len(options["prompts"]) * group:
        raise ValueError(f"{len(options['prompts'])} prompts and groups of {group}, but {len(rows)} completions")
    advantage, spread = _advantage(options, rewards.shape[-1])
    long = {"prompts": max(map(len, options["prompts"])), "completions": max(map(len, rows))}
    cut_off = options.get("mask_truncated_completions")
    prompts = options["prompts"]

    def generate(generation):
        n = schedule.rows * schedule.a_generation
        chosen = np.arange(generation * n, (generation + 1) * n) % len(rows)
        starts = [prompts[i // group] for i in chosen[::group]]
        left = np.array([[model.pad_token] * (long["prompts"] - len(p)) + p for p in starts], np.int32)
        seen = np.arange(long["prompts"])[::-1] < np.array([[len(p)] for p in starts])
        lengths = np.array([[len(rows[i])] for i in chosen])
        ended = np.array([rows[i][-1] in (*model.end_tokens, model.pad_token) for i in chosen])
        alive = np.arange(long["completions"]) < lengths
        if cut_off:
            alive &= ended[:, None]
        right = np.array([rows[i] + [model.pad_token] * (long["completions"] - len(rows[i])) for i in chosen], np.int32)
        terms = rewards[chosen].reshape(-1, group, rewards.shape[-1])
        total = np.asarray(advantages.summed_rewards(terms, _reward_weights(options, terms.shape[-1])))
        completions = Completions(right, np.zeros(right.shape, np.float32), alive)
        weigh, given = lambda mask: _weigh(method, schedule, np.asarray(mask)), lambda _: advantage(terms)
        batch = grpo.make_batch(left, seen, completions, total, weigh=weigh, advantage=given)
        num_tokens = sum(len(prompts[i // group]) + len(rows[i]) for i in chosen)
        return batch, _metrics(total, lengths, ended, spread(terms)) | {"num_tokens": num_tokens}

    return generate


def _metrics(total, lengths, ended, spread):
    """What TRL logs of a generation."""
    return {
        "reward": float(np.nanmean(total)),
        "reward_std": float(np.nanstd(total, ddof=1)),
        "frac_reward_zero_std": float(np.isclose(spread, 0).mean()),
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(1 - ended.mean()),
    }


def _rewards(options):
    """[N, F] float32: one column a reward function; NaN for no verdict."""
    rewards = options["rewards"]
    rewards = list(zip(*rewards.values(), strict=True)) if isinstance(rewards, dict) else rewards
    rewards = np.array(rewards, np.float32)  # null becomes NaN
    if rewards.size % len(options["completions"]):
        raise ValueError(f"{rewards.size} rewards for {len(options['completions'])} completions")
    return rewards.reshape(len(options["completions"]), -1)


def _reward_weights(options, functions):
    given = options.get("reward_weights")
    return np.ones(functions, np.float32) if given is None else np.asarray(given, np.float32)


def _advantage(options, functions):
    """``[P, G, F] -> [P, G]``, and the deviations by which they are divided."""
    scale = options.get("scale_rewards", "group")
    scale = {True: "group", False: "none"}[scale] if isinstance(scale, bool) else scale
    whole = lambda x: np.nanstd(x, ddof=1)
    a_group = lambda x: np.asarray(advantages.group_deviation(x))
    per_sum = {
        "group": (advantages.group_relative_trl, a_group),
        "batch": (advantages.batch_normalised, whole),
        "none": (advantages.group_centred, a_group),
    }
    fn, spread = per_sum[one_of({"scale_rewards": scale}, "scale_rewards", per_sum)]
    order = {"multi_objective_aggregation": options.get("multi_objective_aggregation") or "sum_then_normalize"}
    order = one_of(order, "multi_objective_aggregation", {"sum_then_normalize", "normalize_then_sum"})
    factors = _reward_weights(options, functions)
    total = lambda terms: advantages.summed_rewards(terms, factors)
    if order == "sum_then_normalize":
        return lambda terms: fn(total(terms)), lambda terms: spread(total(terms))
    several = lambda terms: advantages.per_reward_normalised(terms, factors)
    return several, lambda terms: whole(several(terms))  # 0 or about 1


# ---- what is lost


def _a_row(mask):
    """The mean over answers; TRL counts those without a scored token, ours do not."""
    return weights.sequence_mean(mask) * mask.any(-1).mean()


def _method(options, schedule) -> Options:
    """The options of the loss, all of them, as ``replays.policy`` takes them."""
    method = Options(policy.DEFAULTS | DEFAULTS)
    ours = {"mode", "use_old_per_token_logps", "use_tool_mask", "use_sampling_logps", "advantages_2d"}
    ours |= {"importance_sampling_ratio", "num_items_in_batch", "current_gradient_accumulation_steps"}
    for name in policy.DEFAULTS.keys() - ours:
        value = options.get(name)
        if value is not None:
            method[name] = value
    method["steps_per_generation"] = schedule.a_generation
    method["current_gradient_accumulation_steps"] = schedule.a_step
    one_of(method, "loss_type", policy.LOSS_TYPES)
    one_of(method, "importance_sampling_level", {"token", "sequence"})
    return method


def _weigh(method, schedule, mask):
    """[B, T] of a generation, so that the microbatches of an update add up to what TRL descends on."""
    numbers = Options(method | {"num_items_in_batch": mask.sum()})
    parts = jnp.asarray(mask.reshape(schedule.a_generation, schedule.rows, -1))
    return np.asarray(jax.vmap(lambda part: policy._weights(numbers, part))(parts)).reshape(mask.shape)


def _is_recipe(method):
    """Whether ``recipes.grpo`` has this loss: then it is that which is run."""
    usual = {"importance_sampling_level": "token", "delta": None, "top_entropy_quantile": 1.0, "entropy_coef": 0.0}
    usual["off_policy_mask_threshold"] = None
    corrected = method["beta"] and method["use_bias_correction_kl"]
    clips = method["loss_type"] in policy.CLIPPED and method["epsilon"] < 1
    return clips and not corrected and all(method[name] == value for name, value in usual.items())


def make_loss(apply, how, method):
    if _is_recipe(method):
        recipe = grpo.make_loss(apply, how=how, kl=method["beta"], **policy._bounds(method))

    def loss_fn(params, frozen, batch, key):
        logits = transform(apply(params, batch["tokens"], batch["seen"])[0], how)
        now, entropies = logps.token_logps(logits, batch["tokens"]), logps.token_entropies(logits)
        old = jnp.where(batch["fresh"][:, None], jax.lax.stop_gradient(now), batch["old_logps"])
        metrics = report(method, now, old, entropies, batch)
        if _is_recipe(method):
            return recipe(params, frozen, batch, key)[0], metrics
        inputs = {"old_per_token_logps": old, "ref_per_token_logps": batch.get("ref_logps")}
        levels = {method["importance_sampling_level"]}
        terms = policy._loss_per_token(method, inputs, now, entropies, batch["advantages"], batch["mask"], levels)
        loss = weights.weighted_sum(terms[0], batch["weights"])
        # the mean of the microbatch, whatever the loss is divided by
        bonus = objectives.entropy_bonus(entropies, batch["mask"], coef=method["entropy_coef"])
        among = weights.token_mean(batch["mask"] & terms[1])
        return loss + batch["logged"].sum() * weights.weighted_sum(bonus, among), metrics

    return loss_fn


def report(method, now, old, entropies, batch):
    """What TRL logs of a microbatch, so weighted that the microbatches add up to their mean."""
    mask, A, level, kind = batch["mask"], batch["advantages"], method["importance_sampling_level"], method["loss_type"]
    mean = lambda x: weights.weighted_sum(x, batch["logged"])
    an_answer = lambda x: weights.weighted_sum(x, batch["logged_answers"])
    of_ratio = mean if level == "token" else an_answer
    new, before = policy._ratio(now, old, mask, level)
    metrics = {"entropy": mean(entropies)}
    if method["beta"]:
        kl = divergences.k3(now, batch["ref_logps"], mask)
        corrected = objectives.importance_weighted(kl, new, before, mask)
        metrics["kl"] = mean(corrected if method["use_bias_correction_kl"] else kl)
    if kind == "vespo":
        metrics["vespo/phi_seq_mean"] = an_answer(
            objectives.vespo_weights(now, old, A, mask, **policy._vespo_numbers(method))
        )
    bounds = policy._bounds(method)
    if kind == "cispo":
        high = (new - before > jnp.log(bounds["clip_high"])) & (A > 0)
        metrics["cispo_clip_ratio"] = of_ratio(high.astype(jnp.float32))
    if kind in policy.CLIPPED:
        bounded = new if method["delta"] is None else jnp.minimum(new, before + jnp.log(method["delta"]))
        low, high = (of_ratio(x) for x in objectives.clip_indicators(bounded, before, A, mask, **bounds))
        metrics |= {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high}
    return metrics
