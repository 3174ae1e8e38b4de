"""How fast are SFT and DPO, against TRL's trainers, a bare torch loop, and the machine's own matrix products?

    python benchmarks/training.py                                  # 8 layers of width 256: SFT 8 x 512, DPO 8 x 2 x 256
    python benchmarks/training.py --costs                          # of the loop, microbatches, rematerialisation, depth
    python benchmarks/training.py --shape qwen3-1.7b --dtype bfloat16 --length 1024 --remat dots --peers    # a GPU

JSON lines, each side in a process of its own, in turns. SFT is tokens a second of whole steps (AdamW). DPO is tokens a
second of both answers with their prompts, half of them the prompt's: TRL's trainer asks the reference at every step;
here it is asked once for a data set, so the line has two figures, of the step alone and with the reference scored for
it. Ours reads a prompt once for both answers. The floor is the matrix products of a step at the rate of a large
product in the same process; torch's share of its own is ``peer_share``. TRL, torch and transformers are needed for the
ratios only; of Tunix, which wants versions of its own, ``--side tunix`` prints the seconds of a step.

On a CPU much of a step is the kernel's, which hands out the pages of its temporary arrays one by one: huge pages
(``GLIBC_TUNABLES=glibc.malloc.hugetlb=1``, read by glibc when a program starts) made the default step 19% faster, and
so did ``remat="layer"``, which keeps less.
"""

import argparse
import json
import tempfile
import time

import numpy as np
from models import SHAPES, config_of, model_of, operations, parser_of, sft_batch, timed, tokens_of

PEERS = ("torch", "trl", "tunix")
PROMPT = 128  # tokens of a DPO row of 256


def options():
    parser = parser_of(__doc__, ("ours", *PEERS))
    parser.add_argument("--peers", nargs="*", default=["torch", "trl"], choices=PEERS)
    parser.add_argument("--costs", action="store_true", help="what parts of our own training cost")
    return parser.parse_args()


def pairs_of(ask):
    """Prompts [N, 128], and two answers of as many tokens each."""
    size = (3, ask.rows, PROMPT)
    return np.random.default_rng(1).integers(2, SHAPES[ask.shape][0], size, dtype=np.int32)


# ---- ours


def trainer(ask, loss_fn, params, microbatches=1):
    """A function that takes one step of a batch and waits for it."""
    import jax
    import optax

    from pt_jax import training

    optimizer = optax.adamw(1e-3)
    step = training.make_train_step(loss_fn, optimizer, microbatches=microbatches)
    state = training.init_state(params, optimizer, jax.random.key(0))

    def take(batch):
        nonlocal state
        state, metrics = step(state, None, batch)
        return jax.block_until_ready(metrics["loss"])

    return take


def ours(ask) -> dict:
    import jax
    import jax.numpy as jnp

    from pt_jax import models
    from pt_jax.data import packing
    from pt_jax.data.encode import Example
    from pt_jax.recipes import dpo, sft
    from pt_jax.recipes.score import make_score

    config = config_of(ask)
    params = models.load(ask.folder)[0] if ask.folder else models.init(config, jax.random.key(0))
    bound = models.bind(config, models.Execution(dtype=ask.dtype, remat=ask.remat))
    batch, take = sft_batch(ask), trainer(ask, sft.make_loss(bound.apply), params)
    first, run = timed(lambda: take(batch))
    out = {"sft": run, "sft_compile": first - run, "device": jax.devices()[0].device_kind}
    prompts, *answers = pairs_of(ask)
    scored = np.arange(2 * PROMPT) >= PROMPT
    pairs = [[Example(np.concatenate([p, a]), scored) for a in both] for p, *both in zip(prompts, *answers)]
    score, flat = make_score(bound.apply), [x for pair in pairs for x in pair]
    settings = {"pad_token": 0, "length": 2 * PROMPT}
    references = lambda: dpo.reference_logps(score, params, flat, rows=len(flat), **settings)
    known = references().reshape(-1, 2)
    length = max(map(packing.shared_length, pairs))
    batch = dpo.make_shared_batch(pairs, *known.T, pad_token=0, length=length + length % 2)
    take = trainer(ask, dpo.make_shared_loss(bound.apply), params)
    out |= {"dpo": timed(lambda: take(batch))[1], "references": timed(references)[1]}
    n = 2048 if out["device"] == "cpu" else 8192
    a = jnp.ones((n, n), ask.dtype)
    product = jax.jit(jnp.matmul)
    return out | {"peak": 2 * n**3 / timed(lambda: product(a, a), jax.block_until_ready)[1]}


# ---- theirs


def of_torch(ask) -> dict:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model_of(ask).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    tokens = torch.from_numpy(tokens_of(ask)).long().to(device)
    half = torch.autocast(device, dtype=torch.bfloat16, enabled=ask.dtype == "bfloat16")

    def step():
        with half:
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return {"sft": timed(step)[1]} | ({"peak": peak_of_torch()} if device == "cpu" else {})


def peak_of_torch():
    import torch

    a = torch.ones(2048, 2048)
    return 2 * 2048**3 / timed(lambda: a @ a)[1]


def of_trl(ask) -> dict:
    import datasets
    import transformers
    import trl
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(SHAPES[ask.shape][0])}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="w1", pad_token="w0")
    text = lambda ids: " ".join(f"w{i}" for i in ids)
    steps = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.since = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            steps.append(time.perf_counter() - self.since)

    def train(trainer_of, config_of, data, **more):
        steps.clear()
        with tempfile.TemporaryDirectory() as folder:
            settings = config_of(
                output_dir=folder, per_device_train_batch_size=ask.rows, max_steps=6, report_to="none",
                save_strategy="no", logging_strategy="no", gradient_checkpointing=False, learning_rate=1e-3,
                bf16=ask.dtype == "bfloat16", disable_tqdm=True, dataloader_pin_memory=False, **more,
            )  # fmt: skip
            data = datasets.Dataset.from_dict({name: list(column) * 6 for name, column in data.items()})
            trainer_of(
                model_of(ask), args=settings, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()]
            ).train()
        return min(steps)

    prompts, chosen, rejected = ([text(row) for row in part] for part in pairs_of(ask))
    answers = {"chosen": [f" {x}" for x in chosen], "rejected": [f" {x}" for x in rejected]}
    return {
        "sft": train(trl.SFTTrainer, trl.SFTConfig, {"input_ids": tokens_of(ask).tolist()}, max_length=ask.length),
        "dpo": train(trl.DPOTrainer, trl.DPOConfig, {"prompt": prompts} | answers, max_length=2 * PROMPT + 1),
    }


def of_tunix(ask, steps=6) -> dict:
    """Its Qwen3 and its trainer; the shortest time from one batch to the next, with no more than one on its way."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from tunix.models.qwen3 import model as qwen3
    from tunix.sft import peft_trainer, utils

    vocab, layers, width, heads, kv_heads, head, hidden, tied = SHAPES[ask.shape]
    config = qwen3.ModelConfig(
        num_layers=layers, vocab_size=vocab, embed_dim=width, hidden_dim=hidden, num_heads=heads, head_dim=head,
        num_kv_heads=kv_heads, rope_theta=1_000_000, norm_eps=1e-6, use_tied_embedding=tied,
        dtype=jnp.dtype(ask.dtype), param_dtype=jnp.float32,
    )  # fmt: skip
    batch, asked = peft_trainer.TrainingInput(tokens_of(ask), np.ones((ask.rows, ask.length), bool)), []

    def batches():
        for _ in range(steps):
            asked.append(time.perf_counter())
            yield batch

    def inputs(x):
        mask = x.input_mask
        places = {"positions": utils.build_positions_from_mask(mask)}
        return {
            "input_tokens": x.input_tokens,
            "input_mask": mask,
            "attention_mask": utils.make_causal_attn_mask(mask),
        } | places

    settings = peft_trainer.TrainingConfig(eval_every_n_steps=10**6, max_steps=steps, max_inflight_computations=1)
    trainer = peft_trainer.PeftTrainer(qwen3.Qwen3(config, rngs=nnx.Rngs(0)), optax.adamw(1e-3), settings)
    trainer.with_gen_model_input_fn(inputs).train(batches())
    jax.block_until_ready(nnx.state(trainer.model))
    return {"sft": float(min(np.diff([*asked, time.perf_counter()])[2:]))}


# ---- what our own parts cost


def costs(ask):
    """Lines of times relative to the bare step of the default batch, all in this process."""
    import jax
    import optax

    from pt_jax import models, training
    from pt_jax.recipes import sft

    config, batch, optimizer = config_of(ask), sft_batch(ask), optax.adamw(1e-3)
    params = models.init(config, jax.random.key(0))
    loss_of = lambda remat: sft.make_loss(models.bind(config, models.Execution(dtype=ask.dtype, remat=remat)).apply)
    runs = {f"remat {remat}": trainer(ask, loss_of(remat), params) for remat in ("none", "layer", "dots")}
    runs |= {f"microbatches {m}": trainer(ask, loss_of("none"), params, m) for m in (2, 4)}
    seconds = dict.fromkeys(runs, np.inf)
    for _ in range(1 + ask.turns):  # in turns: the machine's own pace changes
        for name, take in runs.items():
            seconds[name] = min(seconds[name], timed(lambda take=take: take(batch), seconds=2)[1])
    bare = seconds["remat none"]
    out = [(name, value / bare, "of the step") for name, value in seconds.items() if value is not bare]
    out.append(("loop", 1 + of_loop(batch) / bare, "of the step"))
    for layers in (2, 8, 32):
        import dataclasses

        deep = dataclasses.replace(config, layers=layers)
        step = training.make_train_step(sft.make_loss(models.bind(deep).apply), optimizer)
        make = lambda deep=deep: training.init_state(models.init(deep, jax.random.key(0)), optimizer, jax.random.key(0))
        lowered = step.lower(jax.eval_shape(make), None, batch)
        start = time.perf_counter()
        lowered.compile()
        out.append((f"compile {layers} layers", time.perf_counter() - start, "s"))
    return out


def of_loop(batch, count=2000):
    """Seconds that ``loop.fit`` adds to a step, with metrics fetched every ten: of steps that hardly take any.

    Those of the model are too long to tell: from one to the next the machine's pace changes by more.
    """
    import jax
    import jax.numpy as jnp
    import optax

    from pt_jax import training
    from pt_jax.training import loop

    sgd = optax.sgd(0.1)
    step = training.make_train_step(lambda params, _, batch, key: (params["w"], {"x": params["w"]}), sgd)

    def each(run):
        state, _ = step(training.init_state({"w": jnp.float32(0)}, sgd, jax.random.key(0)), None, batch)
        start = time.perf_counter()
        jax.block_until_ready(run(state))
        return (time.perf_counter() - start) / count

    def by_hand(state):
        for _ in range(count):
            state, _ = step(state, None, batch)
        return state

    fit = lambda state: loop.fit(state, step, lambda i: batch, steps=count + 1, on_metrics=lambda *_: None)
    times = [(each(by_hand), each(fit)) for _ in range(5)]
    return min(t[1] for t in times) - min(t[0] for t in times)


# ---- the lines


def turn(ask, side, folder) -> dict | None:
    from common import in_a_process  # it imports jax, which torch's side is to be without

    flags = {name: getattr(ask, name) for name in ("shape", "dtype", "rows", "length", "remat")}
    return in_a_process(__file__, side, **flags | ({"folder": folder} if folder else {}))


def main():
    ask = options()
    if ask.side:
        print(json.dumps({"ours": ours, "torch": of_torch, "trl": of_trl, "tunix": of_tunix}[ask.side](ask)))
        return
    import jax

    from pt_jax import models

    config = {name: getattr(ask, name) for name in ("shape", "dtype", "rows", "length", "remat")}
    about = {"config": config, "versions": {"jax": jax.__version__}}
    if ask.costs:
        for name, value, unit in costs(ask):
            print(json.dumps({"name": f"training/{name}", "value": float(f"{value:.6g}"), "unit": unit} | about))
        return
    with tempfile.TemporaryDirectory() as base:
        folder = f"{base}/model" if ask.shape == "small" else None
        if folder:
            models.save(folder, models.init(config_of(ask), jax.random.key(0)), config_of(ask))
        turns = [{side: turn(ask, side, folder) for side in ("ours", *ask.peers)} for _ in range(ask.turns)]
    sides = {side: [t[side] for t in turns if t[side]] for side in turns[0]}
    least = {side: {k: min(t[k] for t in runs if k in t) for k in runs[0] if isinstance(runs[0][k], float)}
             for side, runs in sides.items() if runs}  # fmt: skip
    mine, about["device"] = least["ours"], sides["ours"][0]["device"]
    peak = max(t["peak"] for t in sides["ours"])
    tokens, floor = ask.rows * ask.length, peak / (3 * operations(ask))
    line = {"name": "training/sft", "value": round(tokens / mine["sft"], 1), "unit": "tokens/s"}
    line |= {"floor": round(floor, 1), "share_of_floor": round(tokens / mine["sft"] / floor, 3)}
    line |= {f"vs_{side}": round(x["sft"] / mine["sft"], 3) for side, x in least.items() if side != "ours"}
    if "peak" in least.get("torch", {}):
        of = max(t["peak"] for t in sides["torch"])
        line["peer_share"] = round(tokens / least["torch"]["sft"] * 3 * operations(ask) / of, 3)
    print(json.dumps(line | {"compile_s": round(mine["sft_compile"], 2)} | about))
    tokens = ask.rows * 4 * PROMPT
    whole = mine["dpo"] + mine["references"]
    line = {"name": "training/dpo", "value": round(tokens / mine["dpo"], 1), "unit": "tokens/s"}
    line["with_reference"] = round(tokens / whole, 1)
    row = argparse.Namespace(shape=ask.shape, length=3 * PROMPT)  # of a pair: the prompt, and both answers
    floor = tokens / (ask.rows * row.length * 3 * operations(row) / peak)
    line |= {"floor": round(floor, 1), "share_of_floor": round(tokens / mine["dpo"] / floor, 3)}
    if "dpo" in least.get("trl", {}):
        line |= {"vs_trl": round(least["trl"]["dpo"] / mine["dpo"], 3)}
        line |= {"with_reference_vs_trl": round(least["trl"]["dpo"] / whole, 3)}
    print(json.dumps(line | about))


if __name__ == "__main__":
    main()
