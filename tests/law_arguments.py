"""What the argument names of the mathematics stand for: ``test_laws`` makes its arrays from these tables.

One name, one meaning, throughout ``losses``, ``objectives``, ``divergences`` and ``advantages``. A function with a
``mask`` speaks of tokens, [B, T]; one with neither ``mask`` nor [P, G] rewards speaks of rows, [B]. Axes are named
as in the docstrings; for the names in EITHER they are [B, T] beside a ``mask`` and [B] without one.
"""

import inspect

import numpy as np
import pytest

LENGTHS = np.array([6, 3, 0, 5, 1, 4, 6, 2])  # B = 8 rows, T = 6; one row is empty; no two halves are alike
COLUMNS, VOCAB, REWARD_FUNCTIONS = 6, 7, 3

# name -> axes
AXES = {
    "mask": "B T",
    # nats
    "chosen": "B", "rejected": "B", "ref_chosen": "B", "ref_rejected": "B",
    "chosen_length": "B", "rejected_length": "B", "other_length": "B",
    "log_ratio": "B", "from_reference": "B", "log_sum_sq_probs": "B T",
    # of pairs and of answers sampled online; a leaf of a pytree
    "offsets": "B", "win_rates": "B", "optimal_advantages": "B", "params": "B", "ref_params": "B",
    # of policy objectives, a token
    "advantages": "B T", "losses": "B T",
    "entropies": "B T", "token_scores": "B T", "covariances": "B T", "draws": "B T", "picked": "B T",
    "ratios": "B T", "divergence": "B T", "threshold": "", "rate": "", "finished": "B",
    # a row of logits speaks of the token after it
    "logits": "B T V", "ref_logits": "B T V", "teacher_logits": "B T V",
    # of groups; NaN where there is no verdict
    "rewards": "P G", "lengths": "P G", "greedy_rewards": "P", "reward_terms": "P G F", "reward_weights": "F",
    # of a critic, a token; of answers, a row
    "values": "B T", "old_values": "B T", "returns": "B T", "scores": "B", "bootstrap": "B",
    # of judged answers: the verdict, KTO's and BCO's points between gain and loss, a prompt's chance, weights of rows
    "desirable": "B", "kl": "", "shift": "", "desirable_probs": "B", "row_weights": "B",
    # of a reward model, an answer; of a process reward model, a token
    "chosen_rewards": "B", "rejected_rewards": "B", "margins": "B", "step_logits": "B T", "step_labels": "B T",
}  # fmt: skip
EITHER = {"logps", "old_logps", "ref_logps", "teacher_logps", "sampling_logps"}

NATS = EITHER | {"chosen", "rejected", "ref_chosen", "ref_rejected", "log_ratio", "from_reference", "log_sum_sq_probs"}
POSITIVE = {"entropies", "ratios", "divergence", "row_weights"}
PROBABILITY = {"desirable_probs", "draws", "rate", "win_rates"}
LENGTH = {"chosen_length", "rejected_length", "other_length", "lengths"}  # whole numbers from 1, as floats
YES_NO = {"mask", "desirable", "step_labels", "picked", "finished"}

# Functions that look at the whole batch at once, and say so, as "module.function": why. The laws of microbatches and of
# padded rows are not theirs.
WHOLE_BATCH: dict[str, str] = {
    "objectives.soft.gpg_scale": "how many groups of the batch teach",
    "objectives.tokens.token_quantile": "a quantile of the batch's tokens",
    "objectives.tokens.covariances": "the means of the batch's tokens",
    "objectives.tokens.clip_cov_rate": "how many tokens of the batch are in the band",
    "losses.preference.transport.aot": "the quantiles of the batch",
    "losses.preference.transport.aot_unpaired": "the quantiles of the batch",
    "advantages.batch.batch_normalised": "the deviation of the batch",
    "advantages.batch.leave_one_out_normalised": "the mean and the deviation of the batch",
    "advantages.batch.reinforce_plus_plus_baseline": "the mean and the deviation of the batch",
    "advantages.batch.reinforce_plus_plus": "the mean and the variance of the batch's tokens",
    "advantages.batch.whiten": "the mean and the variance of the batch's tokens",
    "advantages.batch.whiten_keeping_mean": "the mean and the variance of the batch's tokens",
    "losses.preference.unpaired.mismatched_kl": "the mean of the batch",
    "advantages.several.per_reward_normalised": "the mean and the deviation of the batch, after the sum over rewards",
}

# Functions whose arguments or results are no rows and no tokens, as "module.function": which test speaks for the laws.
BESIDE_THE_LAWS: dict[str, str] = {
    "divergences.generalized_jsd_shares": "[B, T, V]; generalized_jsd, their sum, keeps the laws",
    "losses.distillation.teachers_top": "chooses tokens of the vocabulary; top_k_with_tail keeps the laws",
    "losses.distillation.students_top": "as teachers_top",
    "losses.distillation.eithers_top": "as teachers_top",
    "losses.distillation.from_hidden": "takes matrices; losses/test_distillation.py: equals the loss from logits",
    "losses.on_policy_distillation.trl_mean_reward_to_go": "counts padding, as TRL does: test_trl_counts_padding",
}

# Another value of a number, where the one that the law of options would take has no meaning on this little batch.
OTHER = {"max_length": 8, "cache": 20475, "k": 2, "alpha": 1.0}


# Functions for which a token of probability 0 has no value, and why.
NAN_OF_INFINITIES = {
    "losses.preference.online.nash_md_token_kl": "reinforces the token by a win rate, without any ratio"
}


def axes(fn, name) -> str:
    """``"B T"`` and the like; fails for a name that nobody explained."""
    masked = "mask" in inspect.signature(fn).parameters
    if reason := BESIDE_THE_LAWS.get(f"{fn.__module__.removeprefix('pt_jax.')}.{fn.__name__}"):
        pytest.skip(reason)
    if name in EITHER:
        return "B T" if masked else "B"
    if name not in AXES:
        pytest.fail(f"{fn.__module__}.{fn.__name__}: say in {__name__} what {name!r} stands for")
    return "B T" if name == "rewards" and masked else AXES[name]


def positional(fn):
    parameters = inspect.signature(fn).parameters
    return [name for name, p in parameters.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY]


def of_groups(fn):
    return any(axes(fn, name).startswith("P G") for name in positional(fn))


def real_slots(mask, axes):
    """Which slots of an argument exist, given the scored tokens [B, T]; None for what has no padding."""
    if axes == "B T V":  # row t of logits speaks of token t + 1
        return np.pad(mask[:, 1:], ((0, 0), (0, 1)))[..., None] & np.ones(VOCAB, bool)
    return {"B T": mask, "P G": mask, "B": mask.any(1)}.get(axes)


def arguments(fn, seed=0):
    """Arrays for a function, by name, and the scored tokens [B, T] (or judged answers [P, G])."""
    rng = np.random.default_rng(seed)
    mask = np.arange(COLUMNS) < np.roll(LENGTHS, seed)[:, None]
    mask[-2, 2] = False  # a hole: the answer of a tool
    if not of_groups(fn):
        mask[:, 0] = False  # the first token is predicted by nothing
    base = {"B T": -rng.uniform(1.5, 6.0, mask.shape), "B": -rng.uniform(1.5, 6.0, len(mask))}
    sizes = {"B": len(mask), "T": COLUMNS, "V": VOCAB, "P": len(mask), "G": COLUMNS, "F": REWARD_FUNCTIONS}
    kwargs = {}
    for name in positional(fn):
        letters = axes(fn, name)
        shape = tuple(sizes[x] for x in letters.split())
        if name == "mask":
            kwargs[name] = mask
        elif name in YES_NO:
            kwargs[name] = rng.random(shape) < 0.6
        elif name in PROBABILITY:
            kwargs[name] = rng.random(shape).astype(np.float32)
        elif name in LENGTH:
            kwargs[name] = rng.integers(1, 9, shape).astype(np.float32)
        elif name in NATS:  # apart by ratios in [0.3, 3]
            kwargs[name] = (base[letters] + rng.uniform(np.log(0.3), np.log(3), shape)).astype(np.float32)
        elif letters == "P G":
            kwargs[name] = np.where(mask, rng.choice([0.0, 0.35, 0.4, 1.0, -0.7], shape), np.nan).astype(np.float32)
        elif letters == "P G F":  # the first function does not always have a verdict
            x = np.where(mask[..., None], rng.choice([0.0, 0.35, 0.4, 1.0, -0.7], shape), np.nan)
            x[..., 0] = np.where(rng.random(mask.shape) < 0.3, np.nan, x[..., 0])
            kwargs[name] = x.astype(np.float32)
        else:
            x = rng.normal(size=shape)
            kwargs[name] = (np.abs(x) if name in POSITIVE else x).astype(np.float32)
    return kwargs, mask
