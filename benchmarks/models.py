"""How fast are the forward pass and the train step of a decoder, against transformers and torch on the same weights?

    python benchmarks/models.py                                     # 8 layers of width 256, float32, against torch
    python benchmarks/models.py --shape qwen3-1.7b --dtype bfloat16 --rows 16 --length 1024 --remat layer   # a GPU

Each side runs in a process of its own, in turns, so that neither has the other's memory or threads. JSON lines: tokens
a second of the forward pass (logits of every token) and of an SFT step (AdamW), seconds to compile, and the highest
resident memory. The floor is the same operations at the rate that a large product of the same type reaches in the same
process; its share is the model-FLOPs utilisation,

    MFU = tokens/s (2 forward, 6 with backward) (matrix parameters + 2 L T h c / 2) / peak

with h c the width of all heads and T the length, halved because a token sees half of them on average. torch and
transformers are needed for the comparison only; without them the line has no ratio.
"""

import argparse
import json
import resource
import tempfile
import time

import numpy as np

SHAPES = {
    "small": (4096, 8, 256, 4, 2, 64, 1024, True),
    "qwen3-0.6b": (151_936, 28, 1024, 16, 8, 128, 3072, True),
    "qwen3-1.7b": (151_936, 28, 2048, 16, 8, 128, 6144, True),
}


def parser_of(doc, sides):
    """With the options that every benchmark of a whole model has."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="computed in")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--remat", choices=("none", "layer", "dots"), default="none")
    parser.add_argument("--turns", type=int, default=2, help="of each side")
    parser.add_argument("--side", choices=sides, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser


def options():
    parser = parser_of(__doc__, ("ours", "torch"))
    parser.add_argument("--attention", default="auto")
    return parser.parse_args()


def config_of(ask):
    from pt_jax.models import Config

    names = ("vocab", "layers", "width", "heads", "kv_heads", "head_width", "hidden", "tied")
    return Config(**dict(zip(names, SHAPES[ask.shape])), max_length=max(2048, ask.length))


def tokens_of(ask):
    return np.random.default_rng(0).integers(0, SHAPES[ask.shape][0], (ask.rows, ask.length), dtype=np.int32)


def sft_batch(ask):
    tokens, seen = tokens_of(ask), np.ones((ask.rows, ask.length), bool)
    mask = seen & (np.arange(ask.length) > 0)
    return {"tokens": tokens, "seen": seen, "mask": mask, "weights": (mask / mask.sum()).astype(np.float32)}


def operations(ask) -> float:
    """Of a forward pass, a token."""
    vocab, layers, width, heads, kv_heads, head, hidden, _ = SHAPES[ask.shape]
    matrices = layers * (width * head * (2 * heads + 2 * kv_heads) + 3 * width * hidden) + vocab * width
    return 2 * (matrices + layers * ask.length * heads * head)


def timed(run, wait=lambda x: x, seconds=3.0):
    """Seconds of the first call, and the shortest of as many more as fit."""
    start = time.perf_counter()
    wait(run())
    first, best, since = time.perf_counter() - start, float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - since < seconds:
        start = time.perf_counter()
        wait(run())
        best = min(best, time.perf_counter() - start)
    return first, best


def ours(ask) -> dict:
    import jax
    import jax.numpy as jnp
    import optax

    from pt_jax import models, training
    from pt_jax.recipes import sft

    config = config_of(ask)
    params = models.load(ask.folder)[0] if ask.folder else models.init(config, jax.random.key(0))
    bound = models.bind(config, models.Execution(dtype=ask.dtype, remat=ask.remat, attention=ask.attention))
    tokens, seen = tokens_of(ask), np.ones((ask.rows, ask.length), bool)
    forward = jax.jit(lambda params: bound.apply(params, tokens, seen)[0])
    first, run = timed(lambda params=params: forward(params), jax.block_until_ready)
    out = {"forward": run, "forward_compile": first - run, "device": jax.devices()[0].device_kind}
    step = training.make_train_step(sft.make_loss(bound.apply), optax.adamw(1e-3))
    state = training.init_state(params, optax.adamw(1e-3), jax.random.key(0))
    batch = sft_batch(ask)
    del params  # a model of its own would not be in memory beside the state

    def one_step():
        nonlocal state
        state, metrics = step(state, None, batch)
        return metrics["loss"]

    first, run = timed(one_step, jax.block_until_ready)
    n = 2048 if out["device"] == "cpu" else 8192
    a = jnp.ones((n, n), ask.dtype)
    product = jax.jit(jnp.matmul)
    out |= {
        "step": run,
        "step_compile": first - run,
        "peak": 2 * n**3 / timed(lambda: product(a, a), jax.block_until_ready)[1],
    }
    stats = jax.devices()[0].memory_stats() or {}
    return out | {"device_bytes": stats.get("peak_bytes_in_use"), "loss": float(one_step())}


def model_of(ask):
    import torch
    import transformers

    if ask.folder:
        return transformers.AutoModelForCausalLM.from_pretrained(ask.folder, dtype=torch.float32)
    vocab, layers, width, heads, kv_heads, head, hidden, tied = SHAPES[ask.shape]
    config = transformers.Qwen3Config(
        vocab_size=vocab, num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, head_dim=head,
        num_key_value_heads=kv_heads, intermediate_size=hidden, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


def of_torch(ask) -> dict:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model_of(ask)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    tokens = torch.from_numpy(tokens_of(ask)).long().to(device)
    wait = (lambda x: torch.cuda.synchronize()) if device == "cuda" else (lambda x: x)
    half = torch.autocast(device, dtype=torch.bfloat16, enabled=ask.dtype == "bfloat16")

    def forward():
        with torch.no_grad(), half:
            return model(tokens, use_cache=False).logits

    first, run = timed(forward, wait)
    out = {"forward": run, "forward_compile": first - run}

    def one_step():
        with half:
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    first, run = timed(one_step, wait)
    return out | {"step": run, "step_compile": first - run, "loss": one_step()}


def turn(ask, side, folder) -> dict | None:
    from common import in_a_process  # it imports jax, which torch's side is to be without

    flags = {name: getattr(ask, name) for name in ("shape", "dtype", "rows", "length", "remat", "attention")}
    return in_a_process(__file__, side, **flags | ({"folder": folder} if folder else {}))


def main():
    ask = options()
    if ask.side:
        out = (ours if ask.side == "ours" else of_torch)(ask)
        print(json.dumps(out | {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
        return
    import jax

    from pt_jax import models

    with tempfile.TemporaryDirectory() as base:
        folder = f"{base}/model" if ask.shape == "small" else None
        if folder:
            models.save(folder, models.init(config_of(ask), jax.random.key(0)), config_of(ask))
        turns = [{side: turn(ask, side, folder) for side in ("ours", "torch")} for _ in range(ask.turns)]
    sides = {side: [t[side] for t in turns if t[side]] for side in ("ours", "torch")}
    least = {side: {k: min(t[k] for t in runs) for k in ("forward", "step", "resident")}
             for side, runs in sides.items() if runs}  # fmt: skip
    mine, peak = sides["ours"], max(t["peak"] for t in sides["ours"])
    tokens = ask.rows * ask.length
    for what, passes in (("forward", 1), ("step", 3)):
        rate, floor = tokens / least["ours"][what], peak / (passes * operations(ask))
        line = {"name": f"models/{what}", "value": round(rate, 1), "unit": "tokens/s", "floor": round(floor, 1)}
        line |= {"share_of_floor": round(rate / floor, 3)}  # the MFU
        if "torch" in least:
            line["vs_transformers"] = round(least["torch"][what] / least["ours"][what], 3)
            line["vs_transformers_resident"] = round(least["torch"]["resident"] / least["ours"]["resident"], 3)
        line |= {"compile_s": round(min(t[f"{what}_compile"] for t in mine), 2)}
        line |= {"resident_MB": round(least["ours"]["resident"] / 1e6), "device_bytes": mine[0]["device_bytes"]}
        asked = {k: getattr(ask, k) for k in ("shape", "dtype", "rows", "length", "remat", "attention")}
        print(json.dumps(line | {"config": asked, "versions": {"jax": jax.__version__}, "device": mine[0]["device"]}))


if __name__ == "__main__":
    main()
