"""``pt-jax quickstart``: the whole of post-training in one run, by the functions that every other command calls."""

import dataclasses
import json
import pathlib
import shlex
import shutil

import jax
import numpy as np

from pt_jax import folders, models
from pt_jax.commands import common, dpo, grpo, runs, sft
from pt_jax.commands import quickstart_data as world
from pt_jax.data import encode, rows, tokenizers
from pt_jax.rewards import answers
from pt_jax.sampling import text
from pt_jax.sampling.distribution import GREEDY
from pt_jax.tracking import metrics, plots, tables
from pt_jax.tracking.tracker import warning


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quickstart:
    """Pre-trains a tiny model, then takes it through SFT, DPO and GRPO; downloads nothing.

    Args:
      out: folder for the models, the metrics and the picture; an earlier quickstart in it is replaced.
      seed: of everything random; the same seed gives the same numbers, bit for bit.
      fast: a smaller model and fewer steps.
    """

    out: str = "runs/quickstart"
    seed: int = 0
    fast: bool = False


@dataclasses.dataclass(frozen=True)
class Size:
    """How big the quickstart is."""

    documents: int
    layers: int
    width: int
    hidden: int
    pretrain: int  # steps
    sft: int
    dpo: int
    grpo: int


FULL = Size(documents=6000, layers=4, width=160, hidden=432, pretrain=360, sft=180, dpo=50, grpo=60)
FAST = Size(documents=2000, layers=3, width=128, hidden=352, pretrain=150, sft=80, dpo=50, grpo=8)
VOCAB, LENGTH, ANSWER = 512, 256, 12
STAGES = ("base", "sft", "dpo", "grpo")
MARK = "quickstart.json"  # says that a folder is a quickstart's and may be replaced by one


def run(options: Quickstart) -> dict:
    """Everything; prints the table and returns its rows with the metrics of each stage."""
    common.check_numbers(options, seed=(0, common.SEEDS))
    runs.check_place(options.out)
    out = pathlib.Path(options.out).resolve()  # of a link, the folder that it stands for
    folders.check_writable(out, overwrite=(out / MARK).is_file())
    size = FAST if options.fast else FULL
    if out.is_dir():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARK).write_text(json.dumps(dataclasses.asdict(size)) + "\n")
    seconds = {"prepare": 3, "pretrain": size.pretrain / 7, "ask base": 6, "sft": 5 + size.sft / 7, "ask sft": 3}
    seconds |= {"dpo": 8 + size.dpo / 5, "ask dpo": 3, "grpo": 15 + size.grpo / 0.7, "ask grpo": 3}
    found = {}
    with runs.opened(out, options, seconds) as tracker:
        with tracker.stage("prepare", 1) as on:
            prepare(out, size, options.seed)
            on.step(1)
        for stage, train in zip(STAGES, (pretrain, tune, prefer, reinforce)):
            last = train(out, size, options.seed, tracker)
            with tracker.stage(f"ask {stage}", 4) as on:
                found[stage] = ask(out / stage, options.seed, on) | {"last": last}
        records = metrics.read(out / "metrics.jsonl")
        panels = [panel for stage in ("pretrain", "sft", "dpo", "grpo") for panel in plots.PANELS[stage]]
        plots.curves(records, out / "curves.png", panels)
        show(tracker, results(found, records), options.out)
    return found


def prepare(out: pathlib.Path, size: Size, seed: int) -> None:
    """Data files, tokenizer and a fresh model, as a user would have them: files in folders."""
    data = out / "data"
    data.mkdir()
    files = {
        "corpus": world.corpus(size.documents, seed),
        "sft": world.supervised(seed),
        "preferences": world.preferences(),
        "sums": world.sums(seed, held_out=False),
        "sums_held_out": world.sums(seed, held_out=True),
        "identity_held_out": world.identity_questions(),
    }
    for name, content in files.items():
        rows.write_jsonl(data / f"{name}.jsonl", content)
    tokenizer = tokenizers.train_bpe((row["text"] for row in files["corpus"]), vocab=VOCAB, max_length=LENGTH)
    config = models.Config(
        vocab=VOCAB, layers=size.layers, width=size.width, heads=4, kv_heads=2, head_width=size.width // 4,
        hidden=size.hidden, tied=False, max_length=LENGTH, bos_token=tokenizer.bos_token_id,
        end_tokens=(tokenizer.eos_token_id,), pad_token=tokenizer.pad_token_id,
    )  # fmt: skip
    models.save(out / "fresh", models.init(config, jax.random.key(seed)), config, tokenizer)


def pretrain(out, size, seed, tracker) -> dict:
    options = sft.SFT(
        model=str(out / "fresh"), data=str(out / "data/corpus.jsonl"), out=str(out / "base"), steps=size.pretrain,
        batch_size=16, learning_rate=3e-3, warmup=0.05, seed=seed,
    )  # fmt: skip
    return sft.run(options, tracker, "pretrain")


def tune(out, size, seed, tracker) -> dict:
    options = sft.SFT(
        model=str(out / "base"), data=str(out / "data/sft.jsonl"), out=str(out / "sft"), steps=size.sft,
        batch_size=16, learning_rate=1e-3, seed=seed,
    )  # fmt: skip
    return sft.run(options, tracker)


def prefer(out, size, seed, tracker) -> dict:
    options = dpo.DPO(
        model=str(out / "sft"), data=str(out / "data/preferences.jsonl"), out=str(out / "dpo"), steps=size.dpo,
        batch_size=16, beta=0.1, learning_rate=1e-4,
        nll=1.0, seed=seed,
    )  # fmt: skip
    return dpo.run(options, tracker)


def reinforce(out, size, seed, tracker) -> dict:
    options = grpo.GRPO(
        model=str(out / "dpo"), data=str(out / "data/sums.jsonl"), out=str(out / "grpo"), steps=size.grpo,
        batch_size=16, group=8, updates=2, max_new_tokens=ANSWER, learning_rate=2e-4, warmup=0.05, kl=0.04,
        clip_high=0.28, eval_data=str(out / "data/sums_held_out.jsonl"), eval_every=10, seed=seed,
    )  # fmt: skip
    return grpo.run(options, tracker)


def ask(folder: pathlib.Path, seed: int, on) -> dict:
    """Greedy answers of a stage's folder, loaded like any user's, to questions that training never asked."""
    model = common.open_model(folder)
    sampler = model.sampler(ANSWER, GREEDY)

    def answer(prompts):
        tokens = [encode.prompt(model.tokenizer, {"prompt": p, "source": "question"}) for p in prompts]
        key = jax.random.key(seed)
        return text.complete(sampler, model.params, model.tokenizer, tokens, key, pad_token=model.pad_token)

    # a base model has no turns to take: it is asked in plain text, and goes on
    plain = ["Who are you?"] if folder.name == "base" else [world.chat("Who are you?")]
    who = answer(plain)[0]
    on.step(1)
    names = answer([row["prompt"] for row in world.identity_questions()])
    on.step(2)
    found = {
        f"share_{which}_name": float(np.mean([f"I'm {name}" in said for said in names]))
        for which, name in (("sft", world.SFT_NAME), ("dpo", world.DPO_NAME))
    }
    for done, (name, held_out) in enumerate((("accuracy_known", False), ("accuracy", True)), 3):
        asked = world.sums(seed, held_out=held_out)[: world.SUMS_HELD_OUT]
        said = answer([row["prompt"] for row in asked])
        found[name] = float(np.mean([answers.number(text, row) for text, row in zip(said, asked)]))
        on.step(done, found if held_out else None)
    return found | {"who": who.strip()}


def results(found: dict, records: list[dict]) -> list:
    """The tables that are printed at the end: of the answers, and of the metrics."""
    percent = lambda share: f"{100 * share:.0f}%"
    shares = ("share_sft_name", "share_dpo_name", "accuracy_known", "accuracy")
    stages = tables.table(
        "What each stage answers; all but the known sums was never asked in training",
        ["stage", "Who are you?", f"is {world.SFT_NAME}", f"is {world.DPO_NAME}", "known sums", "new sums"],
        [[stage, said["who"], *(percent(said[share]) for share in shares)] for stage, said in found.items()],
    )
    preference, reinforced = found["dpo"]["last"], found["grpo"]["last"]
    clipped = lambda side: float(np.mean([r[f"clip_ratio/{side}_mean"] for r in records if "clip_ratio/low_mean" in r]))
    inside = tables.table(
        "Inside DPO and GRPO, at their last step",
        ["metric", "value"],
        [
            ["DPO: implicit reward margin", preference["rewards/margins"]],
            ["DPO: implicit reward accuracy", preference["rewards/accuracies"]],
            ["DPO: log-probability of the chosen, before", preference["logps/chosen_before"]],
            ["DPO: log-probability of the chosen, after", preference["logps/chosen_after"]],
            ["GRPO: reward of the samples", reinforced["reward"]],
            ["GRPO: KL to the reference", reinforced["kl"]],
            ["GRPO: entropy", reinforced["entropy"]],
            ["GRPO: clip fraction of all steps, low", clipped("low")],
            ["GRPO: clip fraction of all steps, high", clipped("high")],
        ],
    )
    return [stages, inside]


def show(tracker, found: list, out: str) -> None:
    """Prints tables, warnings, and the way on: commands are not folded, so that they can be copied."""
    for table in found:
        tracker.print(table)
    for line in (*map(warning, tracker.warnings), *way_on(out)):
        tracker.print(line, soft_wrap=True, markup=False, highlight=False)


def way_on(out: str) -> list[str]:
    """What is there now, and the commands to go on."""
    of = lambda name: shlex.quote(f"{out}/{name}")
    return [
        f"Curves: {of('curves.png')}   metrics: {of('metrics.jsonl')}   data: {of('data')}",
        f"Models: {', '.join(map(of, STAGES))}",
        f"Go on:  pt-jax chat {of('grpo')}",
        f'        pt-jax generate {of("base")} --prompt "Who are you?"',
        f"        pt-jax sft --model {of('base')} --data {of('data/sft.jsonl')} --out runs/sft",
    ]
