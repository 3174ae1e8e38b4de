"""``pt-jax grpo``: group relative policy optimisation against a verifiable reward."""

import collections
import dataclasses
import importlib.util
import math
import numbers
import pathlib
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pt_jax import advantages, weights
from pt_jax.commands import common, fitting, several
from pt_jax.data import batches, encode
from pt_jax.recipes import grpo as recipe
from pt_jax.recipes.score import make_score
from pt_jax.rewards import answers
from pt_jax.sampling import Sampling, text
from pt_jax.sampling.distribution import GREEDY
from pt_jax.training import distributed, sharding

REWARDS = {"number": answers.number, "exact": answers.exact}
MEANS = {"token": weights.token_mean, "sequence": weights.sequence_mean}
ADVANTAGES = {"relative": advantages.group_relative, "centred": advantages.group_centred}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPO(common.Training):
    """Group relative policy optimisation. Rows: prompt + answer.

    Args:
      batch_size: prompts a step.
      group: completions a prompt.
      updates: updates on the samples of a step.
      max_new_tokens: longest completion.
      slots: completions that are sampled at a time; where one ends, the next is begun. All of a step's when not given.
        Changes a sample only where rounding decides it; fewer slots than completions save memory, and time where
        lengths differ much.
      temperature: of sampling.
      reward: "number" (the last number is the answer's), "exact" (the text is), or FILE.py:FUNCTION of your own, called
        with the completion and its row.
      kl: weight of the KL penalty to the model that training starts from.
      clip_low: how far below 1 the importance ratio may earn.
      clip_high: how far above.
      mean: every token weighs the same, or every completion does.
      advantage: over the group's deviation, or only centred.
    """

    learning_rate: float = 1e-5
    log_every: int = 1
    batch_size: int = 8
    group: int = 8
    updates: int = 1
    max_new_tokens: int = 64
    slots: int | None = None
    temperature: float = 1.0
    reward: str = "number"
    kl: float = 0.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    mean: Literal["token", "sequence"] = "sequence"
    advantage: Literal["relative", "centred"] = "relative"

    def reads(self) -> dict[str, str]:
        file = reward_file(self.reward)
        return super().reads() | ({"reward": file} if file else {})


def run(options: GRPO, tracker=None, stage: str = "grpo") -> dict:
    """Trains and saves; see ``sft.run``."""
    common.check_numbers(
        options, above_0=("updates", "max_new_tokens", "slots", "temperature"), at_least_0=("kl", "clip_high"),
        clip_low=(0.0, 1.0),
    )  # fmt: skip
    if options.group < 2:
        raise ValueError(f"--group {options.group}: answers are compared within a group, so it needs at least 2")
    rows, held_out = common.check_options(options, kinds=("question",))
    reward = find_reward(options.reward)
    try_reward(options.reward, reward, rows, held_out)
    model = common.open_to_train(options)
    how = Sampling(temperature=options.temperature)
    loss_fn = recipe.make_loss(
        model.apply, how=how, kl=options.kl, clip_low=options.clip_low, clip_high=options.clip_high
    )
    fit = fitting.Fit(options, model, loss_fn, len(rows))
    prompts = encode_prompts(model, rows, options.max_new_tokens)
    length = batches.bucket(max(map(len, prompts)))
    length += -(length + options.max_new_tokens) % options.context  # a device has as much of a row as the next
    sampler = fit.sampler(options.max_new_tokens, how, options.slots)
    score = make_score(sharding.within(fit.mesh, model.apply), how)
    reference = fit.reference() if options.kl else None
    sample_key = jax.random.fold_in(jax.random.key(options.seed), 1)
    if held_out:
        evaluate = Evaluation(fit, held_out, reward, options.max_new_tokens, options.slots)
        fit.evaluate("eval_reward", lambda state: evaluate(fit.result_of(state)))

    def rollout(params, step):
        """The batch of a step and what its samples say."""
        ids = fit.rows_of_step(step)
        tokens, seen = text.pad_prompts([prompts[i] for i in ids], pad_token=model.pad_token, length=length)
        # a prompt's random numbers are addressed by when it comes up, so its next turn samples anew
        turns = np.arange(step * len(ids), (step + 1) * len(ids))
        out = sampler(params, tokens, seen, sample_key, group=options.group, prompt_ids=turns)
        texts = []

        def verdicts(of):
            at = slice(of.start * options.group, of.stop * options.group)
            texts.extend(text.to_texts(model.tokenizer, jax.tree.map(lambda x: x[at], out)))
            return [judge(reward, t, rows[i]) for t, i in zip(texts, np.repeat(ids[of], options.group))]

        said = several.judged(verdicts, len(ids))
        rewards = np.asarray(said, np.float32).reshape(len(ids), options.group)
        source, shown = rows[ids[0]]["source"], zip(texts[: options.group], said)
        fit.show(step + 1, [{"source": source, "completion": t, "reward": v} for t, v in shown])
        batch = recipe.make_batch(
            tokens, seen, out, rewards, weigh=MEANS[options.mean], advantage=ADVANTAGES[options.advantage]
        )
        return batch, recipe.group_metrics(rewards, out, model.end_tokens)

    in_a_row = jax.jit(lambda bad, skipped: (bad + 1) * skipped, out_shardings=fit.state.bad.sharding)
    recent = collections.deque(maxlen=options.log_every + 1)  # (step, batch of the host), until known to be good

    def sample_and_update(state, frozen, step):
        """All updates of a step of the loop, which is a rollout and counts as one, in ``state.bad`` too."""
        whole, said = rollout(fit.params_of(state), step)
        batch = fit.place(whole)
        if reference is not None:
            logps = score(reference, batch["tokens"], batch["seen"], batch["mask"])
            whole["ref_logps"] = distributed.fetched(logps)
            batch |= fit.place({"ref_logps": logps})
        recent.append((step, whole))
        if step == fit.done:
            fit.compile(batch)
        skipped, bad = 0, state.bad.copy()  # the state is consumed
        for update in range(options.updates):
            state, metrics = fit.train_step(state, frozen, batch)
            skipped = jnp.maximum(skipped, metrics["skipped"])
            if update == 0:
                now = distributed.fetched(metrics["logps"])
                said |= recipe.sampler_agreement(whole, now)
                whole |= {"old_logps": now, "fresh": np.zeros(len(now), bool)}
                batch |= fit.place({"old_logps": metrics["logps"], "fresh": whole["fresh"]})
        metrics = {k: v for k, v in metrics.items() if v.ndim == 0}
        return state.replace(bad=in_a_row(bad, skipped)), metrics | {"skipped": skipped} | said

    with fit.stage(stage, tracker) as (_, on, logs):
        fit.run(lambda step: step, on, step=sample_and_update, bad_batch=lambda step: dict(recent)[step])
        fit.save(logs)
    return on.latest


class Evaluation:
    """Greedy answers to held-out questions; it has no state and uses no key of the run."""

    def __init__(self, fit: fitting.Fit, rows, reward, length: int, slots: int | None):
        self.model, self.rows, self.reward = fit.model, rows, reward
        self.prompts = encode_prompts(fit.model, rows, length)
        self.sampler = fit.sampler(length, GREEDY, slots)
        self.at_a_time = 64 if slots is None else len(rows)  # one queue for all

    def __call__(self, params) -> dict:
        texts = text.complete(
            self.sampler, params, self.model.tokenizer, self.prompts, jax.random.key(0),
            pad_token=self.model.pad_token, rows=self.at_a_time,
        )  # fmt: skip
        of = lambda at: [judge(self.reward, t, row) for t, row in zip(texts[at], self.rows[at])]
        return {"eval_reward": float(np.nanmean(several.judged(of, len(texts))))}


def encode_prompts(model: common.Model, rows, room: int) -> list[np.ndarray]:
    """The rows' prompts as tokens, each checked to leave room for its completion."""
    prompts = [encode.prompt(model.tokenizer, row) for row in rows]
    for tokens, row in zip(prompts, rows):
        model.check_length(tokens, row["source"], room=room)
    return prompts


def reward_file(name: str) -> str | None:
    """The FILE.py of FILE.py:FUNCTION, or None."""
    return name.rpartition(":")[0] or None


def find_reward(name: str):
    """One of ``REWARDS``, or the function of FILE.py:FUNCTION."""
    if name in REWARDS:
        return REWARDS[name]
    file, function = reward_file(name), name.rpartition(":")[2]
    if not file:
        raise ValueError(f"--reward {name}: must be {', '.join(REWARDS)} or FILE.py:FUNCTION")
    if not pathlib.Path(file).is_file():
        raise ValueError(f"--reward {name}: there is no file {file}")
    spec = importlib.util.spec_from_file_location(pathlib.Path(file).stem, file)
    if spec is None:
        raise ValueError(f"--reward {name}: {file} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ValueError(f"--reward {name}: {file} has no function {function}")
    return getattr(module, function)


def judge(reward, completion: str, row: dict) -> float:
    """A reward's verdict; NaN where it has none and says None."""
    said = reward(completion, row)
    number = isinstance(said, numbers.Real | np.bool_) or getattr(said, "shape", None) == ()
    if said is not None and not number:
        raise ValueError(
            f"{row['source']}: the reward must be a number or None, but the function returned {said!r:.60}"
        )
    return math.nan if said is None else float(said)


def try_reward(name: str, reward, *data) -> None:
    """Judges an empty completion before any work is done: an answer that cannot be compared is found now.

    Of a reward of the user's own, which may be slow, one row of each data set is enough to see what it returns.
    """
    for rows in data:
        for row in rows if name in REWARDS else rows[:1]:
            judge(reward, "", row)
