"""How fast does the sampler draw tokens, against transformers' generate, Tunix's sampler and the machine's own limits?

    python benchmarks/sampling.py                                                   # 8 layers of width 256, float32
    python benchmarks/sampling.py --shape qwen3-1.7b --dtype bfloat16 --rows 1 32 256        # on a GPU
    python benchmarks/sampling.py --skewed --new 512                                # answers of very different lengths
    python benchmarks/sampling.py --ways                                            # penalties, speculation, timings

JSON lines: tokens a second at temperature 1 without an early end. The floor is the larger of two times a step: the
bytes of the weights and of the cache's mean length at the measured bandwidth, and the operations of the products at the
rate that a large product reaches, both in the same process. Each side runs in a process of its own, in turns; a side
that does not run is left out.

``--skewed``: useful tokens a second where one token in new / 8 ends an answer, so that lengths are geometric with a
mean of an eighth of the limit: eight batches of ``sample``, one after the other, each until its last row ends, and the
same prompts through as many slots of ``sample_queue``, which gives the same answers. Beside the ratio of the times that
of the processor's seconds, ``vs_sample_cpu``: it hardly changes with what else a machine does.

``--ways``: tokens a second of the same rows in other ways, each against plain sampling: with all penalties, with the
eight likeliest tokens of each position, through ``sample_until``; and greedy by ``speculate``, with the prompt repeated
so that it has something to look up, against greedy by ``sample``.
"""

import argparse
import json
import time

import numpy as np
from models import SHAPES, timed

SIDES = ("ours", "torch", "tunix")


def options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", type=int, nargs="+", default=[32])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--skewed", action="store_true", help="answers of different lengths: refilled slots")
    parser.add_argument("--ways", action="store_true", help="penalties, alternatives, pieces, speculation")
    parser.add_argument("--turns", type=int, default=2, help="of each side")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def prompts_of(ask, rows):
    return np.random.default_rng(0).integers(0, SHAPES[ask.shape][0], (rows, ask.prompt), dtype=np.int32)


def ours(ask, rows) -> dict:
    import jax
    import jax.numpy as jnp
    from common import bandwidth
    from models import config_of

    from pt_jax import models
    from pt_jax.sampling import sample

    ask.length = ask.prompt + ask.new
    config = config_of(ask)
    params = models.init(config, jax.random.key(0), jnp.dtype(ask.dtype))
    weights = models.parameters.count(params) - (0 if config.tied else config.vocab * config.width)
    params = jax.jit(models.by_layer, static_argnums=0)(config, params)
    bound = models.bind(config, models.Execution(dtype=ask.dtype, cache_by_layer=True))
    prompts, seen = prompts_of(ask, rows), np.ones((rows, ask.prompt), bool)

    def run():
        return sample(
            params, prompts, seen, jax.random.key(0), apply=bound.apply, init_cache=bound.init_cache, length=ask.new,
            end_tokens=(), pad_token=0,
        ).tokens  # fmt: skip

    first, best = timed(run, jax.block_until_ready)
    n = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((n, n), ask.dtype)
    product = jax.jit(jnp.matmul)
    peak = 2 * n**3 / timed(lambda: product(a, a), jax.block_until_ready)[1]
    size = jnp.dtype(ask.dtype).itemsize
    of_token = 2 * config.layers * config.kv_heads * config.head_width * size
    mean = ask.prompt + ask.new / 2
    reading = (weights * size + rows * mean * of_token) / bandwidth()
    operations = rows * 2 * (weights + 2 * config.layers * mean * config.heads * config.head_width)
    out = {"rate": rows * ask.new / best, "compile": first - best, "floor": rows / max(reading, operations / peak)}
    return out | {"device": jax.devices()[0].device_kind, "read_share": reading * ask.new / best}


def skewed(ask, rows) -> dict:
    import jax
    from models import config_of

    from pt_jax import models
    from pt_jax.sampling import sample, sample_queue

    ask.length = ask.prompt + ask.new
    config = config_of(ask)
    params, bound = models.init(config, jax.random.key(0)), models.bind(config)
    prompts, count = prompts_of(ask, 8 * rows), 8 * rows
    seen, key = np.ones(prompts.shape, bool), jax.random.key(0)
    settings = {"apply": bound.apply, "init_cache": bound.init_cache, "length": ask.new, "pad_token": 0}
    settings["end_tokens"] = tuple(range(8 * config.vocab // ask.new))

    def plain():
        parts = [np.arange(i, i + rows) for i in range(0, count, rows)]
        out = [sample(params, prompts[i], seen[i], key, prompt_ids=i, **settings) for i in parts]
        return np.concatenate([x.alive for x in out])

    def refilled():
        return np.asarray(sample_queue(params, prompts, seen, key, slots=rows, **settings).alive)

    useful, seconds = int(plain().sum()), {}
    assert useful == refilled().sum()
    for _ in range(ask.turns):
        for run in (plain, refilled):
            start = time.perf_counter(), time.process_time()
            run()
            taken = time.perf_counter() - start[0], time.process_time() - start[1]
            seconds[run] = np.minimum(taken, seconds.get(run, np.inf))
    ratio, of_processor = seconds[plain] / seconds[refilled]
    return {
        "rate": useful / seconds[refilled][0], "vs_sample": ratio, "vs_sample_cpu": of_processor,
        "mean_length": useful / count,
    }  # fmt: skip


def ways(ask, rows) -> dict:
    """Tokens a second of each way, and of what it is compared with; of guesses also how many tokens a reading gave."""
    import jax
    from models import config_of

    from pt_jax import models
    from pt_jax.sampling import Sampling, sample, sample_until, speculate

    ask.length = ask.prompt + ask.new
    config = config_of(ask)
    params, bound = models.init(config, jax.random.key(0)), models.bind(config)
    prompts = prompts_of(ask, rows)
    seen, key = np.ones(prompts.shape, bool), jax.random.key(0)
    settings = {"apply": bound.apply, "init_cache": bound.init_cache, "length": ask.new, "pad_token": 0}
    settings["end_tokens"] = ()
    penalties = Sampling(repetition_penalty=1.1, frequency_penalty=0.1, presence_penalty=0.1)
    run = lambda by, prompts=prompts, **more: lambda: by(params, prompts, seen, key, **settings | more)
    plain, again = run(sample), np.tile(prompts[:, : ask.prompt // 4], 4)
    greedy = run(sample, again, how=Sampling(0.0))
    each = {
        "penalties": (run(sample, how=penalties), plain), "alternatives": (run(sample, alternatives=8), plain),
        "pieces": (run(sample_until), plain), "look_up": (run(speculate, again, how=Sampling(0.0)), greedy),
    }  # fmt: skip
    seconds = lambda run: timed(run, jax.block_until_ready)[1]
    rates = {name: [rows * ask.new / seconds(run) for run in both] for name, both in each.items()}
    rates["look_up"].append(rows * ask.new / int(np.sum(each["look_up"][0]()[1])))  # how many readings it took
    return rates


def of_tunix(ask, rows) -> dict:
    """Its Qwen3 and its sampler, with a cache for prompt and answer, at temperature 1 by its own drawing."""
    import jax.numpy as jnp
    from flax import nnx
    from tunix.generate import sampler as tunix
    from tunix.models.qwen3 import model as qwen3

    vocab, layers, width, heads, kv_heads, head, hidden, tied = SHAPES[ask.shape]
    dtype = jnp.dtype(ask.dtype)
    config = qwen3.ModelConfig(
        num_layers=layers, vocab_size=vocab, embed_dim=width, hidden_dim=hidden, num_heads=heads, head_dim=head,
        num_kv_heads=kv_heads, rope_theta=1_000_000, norm_eps=1e-6, use_tied_embedding=tied, dtype=dtype,
        param_dtype=dtype,
    )  # fmt: skip

    class Numbers:
        """A tokenizer of texts that are numbers, with an end that never comes."""

        encode = staticmethod(lambda text, **_: [int(x) for x in text.split()])
        decode = staticmethod(lambda ids, **_: " ".join(map(str, ids)))
        bos_id, eos_id, pad_id = (staticmethod(lambda x=x: x) for x in (1, vocab + 1, 0))

    sampler = tunix.Sampler(
        qwen3.Qwen3(config, rngs=nnx.Rngs(0)), Numbers(),
        tunix.CacheConfig(ask.prompt + ask.new, layers, kv_heads, head),
    )  # fmt: skip
    # it puts a first token in front, and takes 0 for padding
    texts = [" ".join(map(str, row)) for row in np.maximum(prompts_of(ask, rows)[:, 1:], 2)]

    def run():
        return sampler(
            texts, ask.new, max_prompt_length=ask.prompt, temperature=1.0, top_p=1.0, seed=0, pad_output=True
        )

    assert np.shape(run().tokens) == (rows, ask.new)
    return {"rate": rows * ask.new / timed(run)[1]}


def of_torch(ask, rows) -> dict:
    import torch
    import transformers

    vocab, layers, width, heads, kv_heads, head, hidden, tied = SHAPES[ask.shape]
    config = transformers.Qwen3Config(
        vocab_size=vocab, num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, head_dim=head,
        num_key_value_heads=kv_heads, intermediate_size=hidden, tie_word_embeddings=tied, eos_token_id=None,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, ask.dtype)).to(device).eval()
    prompts = torch.from_numpy(prompts_of(ask, rows)).long().to(device)

    def run():
        with torch.no_grad():
            return model.generate(
                prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, pad_token_id=0,
                max_new_tokens=ask.new, min_new_tokens=ask.new,
            )  # fmt: skip

    assert run().shape == (rows, ask.prompt + ask.new)
    return {"rate": rows * ask.new / timed(run)[1]}


def turn(ask, side, rows) -> dict | None:
    from common import in_a_process  # it imports jax, which torch's side is to be without

    flags = {name: getattr(ask, name) for name in ("shape", "dtype", "prompt", "new")}
    return in_a_process(__file__, side, rows=rows, **flags)


def main():
    ask = options()
    if ask.side:
        print(json.dumps(dict(zip(SIDES, (ours, of_torch, of_tunix)))[ask.side](ask, ask.rows[0])))
        return
    import jax

    for rows in ask.rows:
        asked = {name: getattr(ask, name) for name in ("shape", "dtype", "prompt", "new")} | {"rows": rows}
        about = {"config": asked, "versions": {"jax": jax.__version__}}
        if ask.skewed or ask.ways:
            about["device"] = jax.devices()[0].device_kind  # not else: it would take the memory of the sides
        if ask.skewed:
            out = skewed(ask, rows)
            line = {"name": "sampling/sample_queue", "value": round(out.pop("rate"), 1), "unit": "tokens/s"}
            print(json.dumps(line | {name: round(x, 2) for name, x in out.items()} | about))
            continue
        if ask.ways:
            for name, (rate, plain, *of_reading) in ways(ask, rows).items():
                line = {"name": f"sampling/{name}", "value": round(rate, 1), "unit": "tokens/s"}
                line |= {"vs_sample": round(rate / plain, 2)} | dict(zip(["tokens_a_reading"], np.round(of_reading, 2)))
                print(json.dumps(line | about))
            continue
        turns = [{side: turn(ask, side, rows) for side in SIDES} for _ in range(ask.turns)]
        mine, *theirs = ([t[side] for t in turns if t[side]] for side in SIDES)
        best = max(mine, key=lambda t: t["rate"])
        line = {"name": "sampling/sample", "value": round(best["rate"], 1), "unit": "tokens/s"}
        floor = max(t["floor"] for t in mine)
        line |= {"floor": round(floor, 1), "share_of_floor": round(best["rate"] / floor, 3)}
        for name, runs in zip(("transformers", "tunix"), theirs):
            if runs:
                line[f"vs_{name}"] = round(best["rate"] / max(t["rate"] for t in runs), 2)
        line |= {
            "share_of_bandwidth": round(best["read_share"], 3),
            "compile_s": round(min(t["compile"] for t in mine), 2),
            "device": best["device"],
        }
        print(json.dumps(line | about))


if __name__ == "__main__":
    main()
