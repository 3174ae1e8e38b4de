"""Adapters on the command line: a PEFT folder out, and a PEFT folder wherever a model is asked for."""

import json
import shutil

import jax
import numpy as np
import pytest

from pt_jax import cli, models
from pt_jax.commands import adapters, common, dpo, fitting, grpo, sft, talk
from pt_jax.models import lora, peft
from pt_jax.tracking import metrics

COMMANDS = {
    "sft": (sft, sft.SFT, "completion", {}),
    "dpo": (dpo, dpo.DPO, "preference", {}),
    "grpo": (grpo, grpo.GRPO, "question", {"group": 3, "max_new_tokens": 4, "kl": 0.1}),
}
BASE = {"steps": 2, "batch_size": 8, "learning_rate": 3e-2, "lora_rank": 2}


@pytest.fixture(scope="module")
def reward_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("rewards") / "mine.py"
    file.write_text("def length(completion, row):\n    return float(len(completion) % 7) + 0.35\n")
    return f"{file}:length"


@pytest.fixture(scope="module")
def options(folder, data, reward_file):
    """(command, out, changes) -> the command's record."""

    def make(command, out, **changes):
        _, kind, lines, more = COMMANDS[command]
        more = more | {"reward": reward_file} if command == "grpo" else more
        return kind(**{"model": str(folder), "data": data[lines], "out": str(out)} | BASE | more | changes)

    return make


def adapters_of(out, folder):
    config = models.huggingface.read_config(folder)
    return peft.load(out, config)


def full(out):
    return common.open_model(out).params


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_leaves_an_adapter_and_leaves_its_base_alone(train, folder, command):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    out = train(command)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    names = {p.name for p in out.iterdir()}
    assert {peft.CONFIG, peft.WEIGHTS, "tokenizer.json", "metrics.jsonl", "run.json"} <= names
    assert not {"config.json", "model.safetensors"} & names
    trained, how = adapters_of(out, folder)
    assert (how.rank, how.alpha, how.dora, how.rslora) == (2, 32.0, False, False)
    assert set(how.targets) == {"wq", "wk", "wv", "wo", "gate", "up", "down"}
    assert all(np.asarray(x).any() for x in jax.tree.leaves(trained))
    assert peft.base(out) == str(folder.resolve())
    assert not same(full(out), models.load(folder)[0])


def test_an_adapter_is_written_without_its_base(options, tmp_path, monkeypatch):
    """Which need not find room on the host; of several processes, on each."""
    save = fitting.Fit.save

    def without(fit, logs=()):
        fit.frozen = None
        save(fit, logs)

    monkeypatch.setattr(fitting.Fit, "save", without)
    sft.run(options("sft", tmp_path / "out"))
    assert peft.is_adapter(tmp_path / "out")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_is_bitwise_repeatable(train, command):
    once, again = train(command), train(command, seed=0)
    assert (once / peft.WEIGHTS).read_bytes() == (again / peft.WEIGHTS).read_bytes()
    assert metrics.read(once / "metrics.jsonl") == metrics.read(again / "metrics.jsonl")


EFFECTS = {
    "lora_rank": 3, "lora_alpha": 8.0, "lora_targets": ("wq", "embed"), "dora": True, "rslora": True,
    "quantize": "nf4",
}  # fmt: skip


@pytest.mark.parametrize("option", EFFECTS)
def test_every_option_of_an_adapter_changes_the_model(train, folder, option):
    out = train("sft", **{option: EFFECTS[option]})
    assert not same(full(out), full(train("sft")))
    how = adapters_of(out, folder)[1]
    said = {"lora_rank": how.rank, "lora_alpha": how.alpha, "dora": how.dora, "rslora": how.rslora}
    if option == "lora_targets":
        assert set(how.targets) == {"wq", "embed"}
    elif option in said:
        assert said[option] == EFFECTS[option]


def test_folded_is_the_same_model_in_full(train):
    out = train("sft", fold=True)
    assert (out / "model.safetensors").is_file() and not (out / peft.CONFIG).exists()
    for a, b in zip(jax.tree.leaves(models.load(out)[0]), jax.tree.leaves(full(train("sft")))):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_over_a_quantised_base_the_adapters_are_trained_and_a_folded_model_is_in_full(train, folder):
    """Its weights are those that were trained on: of the base as it is after 8 bits, no more than half a step away."""
    params, _ = models.load(train("sft", quantize="int8", fold=True))
    trained, how = adapters_of(train("sft", quantize="int8"), folder)
    base, _ = models.load(folder, quantize=models.quantize.int8)
    expected = lora.fold(models.quantize.dequantize(base), trained, how)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    assert not same(params, full(train("sft", quantize="int8")))  # which has the base in full below


def test_the_flags_are_all_tested():
    assert {*adapters.FLAGS, "lora_rank"} == {*EFFECTS, "fold", "lora_plus"}  # the last in test_optimizing.py


def test_the_reference_of_dpo_is_the_base(train):
    first, second = metrics.read(train("dpo") / "metrics.jsonl")
    np.testing.assert_allclose(first["loss"], np.log(2), atol=1e-4)
    np.testing.assert_allclose([first["rewards/chosen"], first["rewards/rejected"]], 0, atol=1e-4)
    assert abs(second["rewards/margins"]) > 1e-2


def test_the_samples_of_grpo_are_of_the_adapted_model_and_its_reference_is_the_base(train):
    first, second = metrics.read(train("grpo") / "metrics.jsonl")
    for record in (first, second):
        assert record["sampling/sampling_logp_difference/max"] < 1e-5
    assert abs(first["kl"]) < 1e-6 and second["kl"] > 1e-4


def test_how_the_work_is_split_changes_no_result(train):
    for a, b in zip(jax.tree.leaves(full(train("sft", fsdp=4))), jax.tree.leaves(full(train("sft")))):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


def said(folder):
    how = {"prompt": "The cat", "max_new_tokens": 12, "temperature": 0.0}
    return talk.generate(talk.Generate(model=str(folder), **how))


def test_an_adapter_is_asked_like_a_model(train, folder, tmp_path):
    assert said(train("sft")) == said(train("sft", fold=True)) != said(folder)
    shutil.copytree(folder, tmp_path / "base")
    shutil.copytree(train("sft"), tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):  # the base has them as well
        (tmp_path / "adapter" / name).unlink(missing_ok=True)
    config = tmp_path / "adapter" / peft.CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "../base"}))
    assert said(tmp_path / "adapter") == said(train("sft"))


def test_training_goes_on_from_an_adapter(train, options, tmp_path):
    """With all weights from where it is; with a new adapter when the result is folded, as no folder is its base."""
    start = full(train("sft"))
    for name, changes in (("all", {"lora_rank": None}), ("new", {"fold": True})):
        sft.run(options("sft", tmp_path / name, model=str(train("sft")), learning_rate=1e-5, **changes))
        params, _ = models.load(tmp_path / name)
        assert not same(params, start)
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(start)):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-3)


BAD = {
    "alpha alone": ({"lora_rank": None, "lora_alpha": 3.0}, "--lora-alpha is of adapters; give --lora-rank"),
    "fold alone": ({"lora_rank": None, "fold": True}, "--fold is of adapters; give --lora-rank"),
    "bits alone": ({"lora_rank": None, "quantize": "int8"}, "--quantize is of adapters; give --lora-rank"),
    "rank": ({"lora_rank": 0}, "--lora-rank must be above 0"),
    "alpha": ({"lora_alpha": -1.0}, "--lora-alpha must be"),
    "nothing": ({"lora_targets": ("q_proj",)}, "target 'q_proj' matches none of the products of this model: .*wq"),
    "dora of an embedding": ({"lora_targets": ("embed",), "dora": True}, "target 'embed': DoRA is of products"),
    "twice": ({"model": "{adapter}"}, r"--model \S+ is an adapter already.* --fold"),
    "its base": ({"model": "{adapter}", "out": "{base}", "fold": True, "overwrite": True},
                 r"--out \S+ would replace the base of --model"),
    "of another": ({"model": "{other}", "lora_rank": None}, r"lora_A.weight has shape \(2, 16\); the model"),
    "without its base": ({"model": "{lost}", "lora_rank": None}, r"gone: no such folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(train, options, folder, tmp_path, case):
    changes, message = BAD[case]
    where = {"adapter": train("sft"), "base": folder, "other": tmp_path / "other", "lost": tmp_path / "lost"}
    for name, base in (("other", tmp_path / "wide"), ("lost", "gone")):
        shutil.copytree(train("sft"), where[name])
        file = where[name] / peft.CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))
    config = models.Config(vocab=304, layers=1, width=20, heads=2, kv_heads=1, head_width=8, hidden=24)
    models.save(tmp_path / "wide", models.init(config, jax.random.key(0)), config)
    changes = {k: v.format(**where) if isinstance(v, str) else v for k, v in changes.items()}
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ValueError, match=message):
        sft.run(options("sft", **{"out": tmp_path / "deep" / "out"} | changes))
    assert not (tmp_path / "deep").exists()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_an_experts_adapter_that_peft_cannot_read_is_refused_before_training(options, tmp_path):
    config = models.Config(
        vocab=304, layers=1, width=16, heads=2, kv_heads=1, head_width=8, hidden=24, family="mixtral", qk_norm=False,
        experts=2, expert_hidden=8,
    )  # fmt: skip
    models.save(tmp_path / "model", models.init(config, jax.random.key(0)), config)
    given = options("sft", tmp_path / "out", model=str(tmp_path / "model"), lora_targets=("expert_*",))
    with pytest.raises(ValueError, match=r"target 'expert_\w+': PEFT has no settled form .* fold the adapters"):
        sft.run(given)


def test_the_flags_arrive(folder, data, tmp_path, capsys):
    words = ["sft", "--model", folder, "--data", data["completion"], "--out", tmp_path / "out", "--batch-size", 8]
    words += [
        "--lora-rank",
        4,
        "--lora-alpha",
        8,
        "--dora",
        "--rslora",
        "--quantize",
        "nf4",
        "--lora-targets",
        "w[qv]",
        "q_proj",
    ]
    assert cli.main([str(word) for word in words]) == 2
    assert "target 'q_proj' matches none" in capsys.readouterr().err
