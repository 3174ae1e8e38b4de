"""Does this device compute what it should? Attention by every program that it has, and the sampler against the scorer.

    python benchmarks/kernels.py

JSON lines. Attention: logits of what is seen and gradients of a small decoder computed in bfloat16, as relative norms
of the error against plain attention in float32; "auto" and "plain" should be of one size. On an H200 both were 0.01 for
logits, and 0.02 for the worst gradient, or 0.06 where values have much in common (``models.attention`` says why).
Sampling: whether the same key gives the same tokens and log-probabilities again, and the largest difference between a
token's log-probability in the sampler and in the trainer, in float32 with products of full precision.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pt_jax import models
from pt_jax.models import Config, Execution
from pt_jax.recipes.score import make_score
from pt_jax.sampling import Sampling, sample

QWEN = {"vocab": 515, "layers": 3, "width": 128, "heads": 8, "kv_heads": 2, "head_width": 64, "hidden": 256}
LENGTH = 256
TEXTS = np.repeat(np.int32([[1, 2, 3], [1, 2, 0], [2, 2, 1]]), (90, 110, 56), axis=1)
SEEN = {
    "left": np.arange(LENGTH) >= np.array([[0], [37], [100]]),
    "right": np.arange(LENGTH) < np.array([[256], [201], [33]]),
    "texts": TEXTS,
    "branches": np.stack([TEXTS, (np.arange(LENGTH)[None] % 90 > 40) * np.int32([[1], [2], [0]])], -1),
}
CASES = {
    "left padding": ({}, "left"),
    "right padding": ({}, "right"),
    "windows": ({"windows": (0, 64, 32)}, "left"),
    "as many keys as queries": ({"heads": 4, "kv_heads": 4, "head_width": 128}, "left"),
    "packed": ({}, "texts"),
    "shared beginnings": ({}, "branches"),
}


def weights(config):
    """Far from their beginnings, so that every norm and every product matters."""
    keys = iter(jax.random.split(jax.random.key(1), 99))
    return jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape, x.dtype), models.init(config, jax.random.key(0))
    )


def error(got, expected) -> float:
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def attention(name):
    more, form = CASES[name]
    config, seen = Config(**QWEN | more), SEEN[form]
    tokens = np.random.default_rng(0).integers(0, config.vocab, seen.shape[:2], dtype=np.int32)
    there = (seen if seen.ndim == 2 else seen[..., 0]) > 0

    @partial(jax.jit, static_argnums=(1, 2))
    def graded(params, program, dtype):
        def loss(params):
            how = Execution(attention=program, dtype=dtype)
            logits = jnp.where(there[..., None], models.bind(config, how).apply(params, tokens, seen)[0], 0)
            return jax.nn.log_softmax(logits.astype(jnp.float32))[..., 7].sum() / there.sum(), logits

        return jax.grad(loss, has_aux=True)(params)

    params, out = weights(config), {}
    with jax.default_matmul_precision("highest"):
        exact, expected = graded(params, "plain", "float32")
    for program in ("plain", "auto"):
        gradient, logits = graded(params, program, "bfloat16")
        worst = max(map(error, jax.tree.leaves(gradient), jax.tree.leaves(exact)))
        out[program] = {"logits": round(error(logits, expected), 4), "worst_gradient": round(worst, 4)}
    return out


def sampling():
    config = Config(**QWEN)
    params, model, how = weights(config), models.bind(config), Sampling(temperature=0.7, top_p=0.9)
    prompts, seen = np.random.default_rng(0).integers(0, 515, (3, 40), dtype=np.int32), SEEN["left"][:, 60:100]
    seen[:, -1] = True
    run = partial(
        sample, params, prompts, seen, jax.random.key(1), apply=model.apply, init_cache=model.init_cache, length=65,
        end_tokens=(3,), pad_token=3, group=5, how=how,
    )  # fmt: skip
    one, two = run(), run()
    again = all(bool((x == y).all()) for x, y in ((one.tokens, two.tokens), (one.logps, two.logps)))
    rows = np.repeat(prompts, 5, 0), np.repeat(seen, 5, 0)
    tokens, seen = (np.concatenate(x, 1) for x in zip(rows, (one.tokens, one.alive)))
    mask = np.concatenate([np.zeros_like(rows[1]), one.alive], 1)
    scored = make_score(model.apply, how)(params, tokens, seen, mask)[:, 40:]
    return {"same_again": again, "sampler_to_trainer": float(jnp.where(one.alive, abs(scored - one.logps), 0).max())}


def main():
    device = jax.devices()[0].device_kind
    for name in CASES:
        print(json.dumps({"name": f"kernels/{name}", **attention(name), "device": device}), flush=True)
    with jax.default_matmul_precision("highest"):
        print(json.dumps({"name": "kernels/sampling", **sampling(), "device": device}))


if __name__ == "__main__":
    main()
