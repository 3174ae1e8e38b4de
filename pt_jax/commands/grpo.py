"""``pt-jax grpo``: group relative policy optimisation against a verifiable reward."""

import collections
import dataclasses
import importlib.util
import math
import numbers
import pathlib
from typing import Literal

import jax
import numpy as np

from pt_jax import advantages, weights
from pt_jax.commands import common, fitting
from pt_jax.data import batches, encode
from pt_jax.data import rows as data_rows
from pt_jax.recipes import grpo as recipe
from pt_jax.recipes.score import make_score
from pt_jax.rewards import answers
from pt_jax.sampling import Sampling, text
from pt_jax.sampling.distribution import GREEDY
from pt_jax.training import loop, sharding

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
      temperature: of sampling.
      reward: "number" (the last number is the answer's), "exact" (the text is), or FILE.py:FUNCTION of your own, called
        with the completion and its row.
      kl: weight of the KL penalty to the model that training starts from.
      clip_low: how far below 1 the importance ratio may earn.
      clip_high: how far above.
      mean: every token weighs the same, or every completion does.
      advantage: over the group's deviation, or only centred.
      eval_data: rows to answer greedily, for the metric eval_reward.
      eval_every: steps between two evaluations; also before the first step and after the last.
      patience: end after so many evaluations in a row that were no better than the best before them.
    """

    learning_rate: float = 1e-5
    log_every: int = 1
    batch_size: int = 8
    group: int = 8
    updates: int = 1
    max_new_tokens: int = 64
    temperature: float = 1.0
    reward: str = "number"
    kl: float = 0.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    mean: Literal["token", "sequence"] = "sequence"
    advantage: Literal["relative", "centred"] = "relative"
    eval_data: str | None = None
    eval_every: int = 10
    patience: int | None = None


def run(options: GRPO, tracker=None, stage: str = "grpo") -> dict:
    """Trains and saves; see ``sft.run``."""
    common.check_numbers(
        options, above_0=("updates", "max_new_tokens", "eval_every", "temperature", "patience"),
        at_least_0=("kl", "clip_high"), clip_low=(0.0, 1.0),
    )  # fmt: skip
    if jax.process_count() > 1:
        raise ValueError(
            "--coordinator: grpo reads its samples on one host, so it runs in one process; sft and dpo in several"
        )
    if options.group < 2:
        raise ValueError(f"--group {options.group}: answers are compared within a group, so it needs at least 2")
    if options.patience and not options.eval_data:
        raise ValueError(f"--patience {options.patience} is of evaluations; give --eval-data")
    files = {"--eval-data": options.eval_data, "--reward": reward_file(options.reward)}
    rows = common.check_options(options, kinds=("question",), **files)
    held_out = data_rows.read(options.eval_data, kinds=("question",)) if options.eval_data else []
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
    sampler = model.sampler(options.max_new_tokens, how)
    score = make_score(sharding.within(fit.mesh, model.apply), how)
    reference = fit.reference() if options.kl else None
    sample_key = jax.random.fold_in(jax.random.key(options.seed), 1)
    evaluate = Evaluation(model, held_out, reward, options.max_new_tokens)

    def rollout(params, step):
        """The batch of a step and what its samples say."""
        ids = fit.rows_of_step(step)
        tokens, seen = text.pad_prompts([prompts[i] for i in ids], pad_token=model.pad_token, length=length)
        # a prompt's random numbers are addressed by when it comes up, so its next turn samples anew
        turns = np.arange(step * len(ids), (step + 1) * len(ids))
        out = sampler(params, *fit.place((tokens, seen)), sample_key, group=options.group, prompt_ids=turns)
        texts = text.to_texts(model.tokenizer, out)
        verdicts = [judge(reward, t, rows[i]) for t, i in zip(texts, np.repeat(ids, options.group))]
        rewards = np.asarray(verdicts, np.float32).reshape(len(ids), options.group)
        source = rows[ids[0]]["source"]
        shown = [{"source": source, "completion": t, "reward": v} for t, v in zip(texts[: options.group], verdicts)]
        fit.show(step + 1, shown)
        batch = recipe.make_batch(
            tokens, seen, out, rewards, weigh=MEANS[options.mean], advantage=ADVANTAGES[options.advantage]
        )
        return batch, recipe.group_metrics(rewards, out, model.end_tokens)

    recent = collections.deque(maxlen=options.log_every + 1)  # (step, batch), until it is known whether they were good

    def sample_and_update(state, frozen, step):
        """All updates of a step of the loop, which is a rollout and counts as one."""
        batch, said = rollout(fit.params_of(state), step)
        batch = fit.place(batch)
        if reference is not None:
            batch |= fit.place({"ref_logps": score(reference, batch["tokens"], batch["seen"], batch["mask"])})
        recent.append((step, batch))
        if step == fit.done:
            fit.compile(batch)
        skipped = 0
        for update in range(options.updates):
            state, metrics = fit.train_step(state, frozen, batch)
            skipped = max(skipped, int(metrics["skipped"]))
            if update == 0:
                said |= recipe.sampler_agreement(batch, metrics["logps"])
                batch |= fit.place({"old_logps": metrics["logps"], "fresh": np.zeros(len(batch["fresh"]), bool)})
        metrics = {k: v for k, v in metrics.items() if v.ndim == 0}
        return state, metrics | {"skipped": skipped} | said

    history = []  # of the evaluations

    def at_an_end():
        return bool(options.patience) and loop.out_of_patience(history, options.patience, max)

    def evaluation(step, state, metrics):
        if step % options.eval_every and step != fit.steps:
            return None
        found = evaluate(fit.params_of(state))
        history.append(found["eval_reward"])
        if at_an_end():
            raise loop.EndOfTraining(**found)
        return found

    with fit.stage(stage, tracker) as (_, on, logs):
        if held_out and fit.done == 0:
            on.step(0, evaluate(fit.params))
            history.append(on.latest["eval_reward"])
        history += [record["eval_reward"] for record in fit.records() if "eval_reward" in record and fit.done]
        ended = fit.done and "eval_reward" in on.latest and at_an_end()  # and killed before its model was there
        if not ended:
            fit.run(
                lambda step: step, on, step=sample_and_update, callbacks=(evaluation,) if held_out else (),
                bad_batch=lambda step: dict(recent)[step],
            )  # fmt: skip
        fit.save(logs)
    return on.latest


class Evaluation:
    """Greedy answers to held-out questions; it has no state and uses no key of the run."""

    def __init__(self, model: common.Model, rows, reward, length: int):
        self.model, self.rows, self.reward = model, rows, reward
        self.prompts = encode_prompts(model, rows, length)
        self.sampler = model.sampler(length, GREEDY)

    def __call__(self, params) -> dict:
        texts = text.complete(
            self.sampler, params, self.model.tokenizer, self.prompts, jax.random.key(0), pad_token=self.model.pad_token
        )
        return {"eval_reward": float(np.nanmean([judge(self.reward, t, row) for t, row in zip(texts, self.rows)]))}


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
