"""Distillation.

TRL hands its losses logits that are cut to the tokens they predict: row t speaks of label t, where ours speaks of token
t + 1. So logits get a row more at the end (``shifted``), and what is a token one more at the beginning (``tokens``).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from oracle import one_of

from pt_jax import divergences, logps, weights
from pt_jax.losses import distillation as losses
from pt_jax.losses import on_policy_distillation as sampled

REDUCTIONS = ["batchmean", "sum", "mean", "none"]


def shifted(x):
    return jnp.pad(jnp.asarray(x), ((0, 0), (0, 1), (0, 0)))


def tokens(x):
    return jnp.pad(jnp.asarray(x), ((0, 0), (1, 0)))


def total(x, mask):
    return weights.weighted_sum(x, mask.astype(x.dtype))


def mean(x, mask, items):
    """Over the scored tokens, or as many as ``items`` says that there are in all the batches together."""
    return total(x, mask) / (jnp.maximum(mask.sum(), 1) if items is None else items)


def with_gradient(value, inputs, wanted, name="student_logits"):
    """The value of a function of the student's logits, and the gradient of its sum."""
    logits = jnp.asarray(inputs[name])
    out = {"loss": value(logits)}
    if f"grad_{name}" in wanted:
        out[f"grad_{name}"] = jax.grad(lambda logits: value(logits).sum())(logits)
    return out


def reduced(options, inputs, wanted, divergence, shares=None):
    """A divergence, reduced as TRL's static functions do."""
    reduction = options.get("reduction", "batchmean")
    items = options.get("num_items_in_batch")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, known are {REDUCTIONS}")
    mask, teacher = tokens(inputs["labels"] != -100), shifted(inputs["teacher_logits"])
    scored = np.nonzero(np.asarray(mask))

    def value(logits):
        if reduction == "none" and items is None:
            return shares(shifted(logits), teacher, mask)[scored]
        loss = divergence(shifted(logits), teacher, mask)
        if reduction == "sum" and items is None:
            return total(loss, mask)
        # TRL's mean is over the vocabulary, too
        size = logits.shape[-1] if reduction == "mean" and items is None else 1
        return mean(loss, mask, items) / size

    return with_gradient(value, inputs, wanted)


def gkd(options, inputs, wanted):
    beta, temperature = options["beta"], options["temperature"]

    def shares(logits, teacher, mask):
        return divergences.generalized_jsd_shares(logits / temperature, teacher / temperature, mask, beta=beta)

    jsd = functools.partial(losses.generalized_jsd, beta=beta, temperature=temperature)
    return reduced(options, inputs, wanted, jsd, shares)


gold = gkd


def iw_opd(options, inputs, wanted):
    return _iw_opd(options, inputs, wanted) if "iw_opd_gamma" in options else _iw_opd_jsd(options, inputs, wanted)


def _iw_opd_jsd(options, inputs, wanted):
    """GKD's loss, if wanted on the top-k of whom the mean is over."""
    beta, top_k, add_tail = options["beta"], options["top_k"], one_of(options, "add_tail", [True, False])
    if not 0 < top_k < inputs["student_logits"].shape[-1]:
        return gkd(options, inputs, wanted)
    on_top = functools.partial(
        losses.top_k_with_tail if add_tail else losses.top_k_renormalised,
        k=top_k,
        temperature=options["temperature"],
        divergence=functools.partial(losses.generalized_jsd, beta=beta),
        support={0: losses.teachers_top, 1: losses.students_top}.get(beta, losses.eithers_top),
    )
    return reduced(options, inputs, wanted, on_top)


def _iw_opd(options, inputs, wanted):
    temperature, gamma, epsilon = options["temperature"], options["iw_opd_gamma"], options["iw_opd_epsilon"]
    by_rollout, items = one_of(options, "use_rollout_logprobs", [True, False]), options["num_items_in_batch"]
    labels = inputs["labels"]
    mask, ids = tokens(labels != -100), tokens(np.maximum(labels, 0))
    teacher_logps, rollout_logps = tokens(inputs["teacher_actual_logprobs"]), tokens(inputs["rollout_logprobs"])

    def value(logits):
        x = logps.token_logps(shifted(logits) / temperature, ids)
        old_logps = rollout_logps if by_rollout else x
        loss, plain = (sampled.iw_opd(x, old_logps, teacher_logps, mask, gamma=g) for g in (gamma, 0.0))
        # TRL divides by epsilon where the distances of a row sum to less: the share of each is smaller by this factor
        distance = jnp.abs(sampled.opd_advantages(old_logps, teacher_logps, mask)).sum(1, keepdims=True)
        share = distance / jnp.maximum(distance, epsilon)
        return mean((1 + gamma * (1 - share)) * plain + share * (loss - plain), mask, items)

    return with_gradient(value, inputs, wanted)


def distillation(options, inputs, wanted):
    beta, temperature, items = options["beta"], options["temperature"], options["num_items_in_batch"]
    mask = tokens(inputs["completion_mask"] != 0)
    unembed, teacher_unembed = jnp.asarray(inputs["student_w"]), jnp.asarray(inputs["teacher_w"])
    teacher = shifted(inputs["teacher_hidden"])

    def a_token(hidden, unembed, divergence):
        return losses.from_hidden(
            shifted(hidden), unembed, teacher, teacher_unembed, mask, divergence=divergence, chunk=4
        )

    def value(hidden, unembed):
        jsd = functools.partial(losses.generalized_jsd, beta=beta, temperature=temperature)
        return mean(a_token(hidden, unembed, jsd), mask, items)

    student = jnp.asarray(inputs["student_hidden"]), unembed
    entropies = a_token(*student, lambda logits, *_: logps.token_entropies(logits / temperature))
    grad_hidden, grad_w = jax.grad(value, argnums=(0, 1))(*student)
    return {
        "loss": value(*student), "entropy_sum": total(entropies, mask), "n_valid": mask.sum(),
        "grad_hidden": grad_hidden, "grad_w": grad_w,
    }  # fmt: skip


def self_distillation(options, inputs, wanted):
    """SDPO's; the loss of every position, whatever its label."""
    alpha = options["distillation_alpha"]
    teacher, mask = shifted(inputs["teacher_logits"]), tokens(np.ones(inputs["labels"].shape, bool))
    if "completion_ids" in options:
        one_of(options, "completion_ids", ["labels.clamp(0)"])
        one_of(options, "distillation_alpha", [1.0])
        ids = tokens(np.maximum(inputs["labels"], 0))

        def divergence(logits, teacher, mask):
            return sampled.sampled_reverse_kl(logps.token_logps(logits, ids), logps.token_logps(teacher, ids), mask)
    else:
        divergence = functools.partial(losses.generalized_jsd, beta=alpha)
    top_k, add_tail = options.get("distillation_topk"), options.get("distillation_add_tail", False)
    if top_k is not None:
        on_top = {True: losses.top_k_with_tail, False: losses.top_k_renormalised}[add_tail]
        divergence = functools.partial(on_top, k=top_k, divergence=divergence, support=losses.students_top)
    out = with_gradient(lambda logits: divergence(shifted(logits), teacher, mask)[:, 1:], inputs, wanted)
    return out | {"per_token": out["loss"]}


def minillm(options, inputs, wanted):
    normalised = one_of(options, "length_normalization", [True, False])
    advantages = sampled.trl_mean_reward_to_go if normalised else sampled.trl_reward_to_go
    logps, teacher_logps, mask = (jnp.asarray(inputs[x]) for x in ("student_logps", "teacher_logps", "mask"))
    return {"advantages": advantages(logps, teacher_logps, mask != 0, gamma=options["gamma"])}
