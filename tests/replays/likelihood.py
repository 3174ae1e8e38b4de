"""Families sft and kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from oracle import ignore, one_of

from pt_jax import logps, weights
from pt_jax.losses import likelihood


def sft(options, inputs, wanted):
    loss_of = {"nll": likelihood.nll, "dft": likelihood.dft}[one_of(options, "loss_type", {"nll", "dft"})]
    mask, items = jnp.asarray(inputs["label_mask"], bool), options["num_items_in_batch"]
    # N: the labels of the batch, or of the whole accumulation window
    count = mask.sum() if items is None else items
    # TRL hands this function log-probabilities that are 0 where there is no label, and sums over all of them: the
    # value is ours, and its recorded gradient is that of a scored token there as well.
    everywhere = jnp.ones_like(mask)
    w = everywhere / jnp.maximum(count, 1)
    loss = lambda x: weights.weighted_sum(loss_of(x, everywhere), w)
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(inputs["per_token_logps"]))
    return {"loss": value, "grad_logps": gradient}


def kernel(options, inputs, wanted):
    if "std" in wanted:
        return {"std": _nanstd(inputs["x"], options.get("dim"))}
    if "logits" in inputs:
        # TRL scores index[..., t] with row t; ours, token t + 1
        logits, index = jnp.asarray(inputs["logits"]) / options["temperature"], jnp.asarray(inputs["index"])
        rows = lambda x, value: jnp.pad(x, [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2), constant_values=value)
        tokens = jnp.pad(index, [(0, 0), (1, 0)])
        return {"logps": logps.token_logps(rows(logits, 0), tokens)[:, 1:]}
    ignore(options, "vocab_chunk")  # a detail of TRL's loop
    fixed = {"temperature": options["temperature"], "scale": options["logit_scale"]}
    fixed["softcap"] = options["final_logit_softcapping"]
    tokens = jnp.pad(jnp.asarray(inputs["targets"])[None], [(0, 0), (1, 0)])
    pad = lambda x: jnp.pad(x[None], [(0, 0), (0, 1), (0, 0)])
    score = functools.partial(logps.token_scores, chunk=5, **fixed)

    def total(hidden, unembed):
        scores = jax.tree.map(lambda x: x[0, 1:], score(pad(hidden), unembed, tokens))
        return scores.logps.sum() + 0.3 * scores.entropies.sum(), scores

    arguments = jnp.asarray(inputs["hidden"]), jnp.asarray(inputs["weight"])
    (_, scores), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(*arguments)
    return {
        "log_probs": scores.logps,
        "entropy": scores.entropies,
        "log_sum_sq_probs": scores.log_collisions,
        "mean_logits": scores.mean_logits,
        "is_top1": np.asarray(scores.hits, bool),
        "grad_hidden": gradients[0],
        "grad_weight": gradients[1],
    }


def _nanstd(x, dim):
    """TRL's helper: ddof 1, NaN with fewer than two values. Ours is inside ``advantages``, where NaN becomes 0."""
    x = np.asarray(x)
    x = x.reshape(1, -1) if dim is None else np.moveaxis(x, dim, -1)
    return np.nanstd(x, -1, ddof=1).reshape(() if dim is None else x.shape[:-1])
