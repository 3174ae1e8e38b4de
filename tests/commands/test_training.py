"""``pt-jax sft``, ``dpo`` and ``grpo``: a folder and a file in, a folder out; every option does something."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from pt_jax import models
from pt_jax.commands import dpo, grpo, sft
from pt_jax.tracking import metrics
from pt_jax.tracking.tracker import Tracker

COMMANDS = {
    "sft": (sft, sft.SFT, "completion"),
    "dpo": (dpo, dpo.DPO, "preference"),
    "grpo": (grpo, grpo.GRPO, "question"),
}
# two steps of eight rows (the tests' eight simulated devices each get one), with rates at which options show
BASE = {"steps": 2, "batch_size": 8, "learning_rate": 1e-2, "clip": 0.5}
ROLLOUT = {"group": 3, "max_new_tokens": 4, "reward": "number"}


@pytest.fixture(scope="module")
def reward_file(tmp_path_factory):
    """A reward that a random model does not always miss."""
    file = tmp_path_factory.mktemp("rewards") / "mine.py"
    file.write_text("def length(completion, row):\n    return float(len(completion) % 7) + 0.35\n")
    return f"{file}:length"


@pytest.fixture(scope="module")
def train(folder, data, reward_file, tmp_path_factory):
    """(command, options) -> (parameters, records), each run once."""
    done = {}

    def run(command, **changes):
        module, kind, rows = COMMANDS[command]
        name = json.dumps([command, changes], sort_keys=True)
        if name not in done:
            out = tmp_path_factory.mktemp("runs") / "out"
            more = ROLLOUT | {"reward": reward_file} if command == "grpo" else {}
            options = {"model": str(folder), "data": data[rows], "out": str(out)} | BASE | more | changes
            module.run(kind(**options))
            params, _ = models.load(out)
            done[name] = jax.device_get(params), metrics.read(out / "metrics.jsonl"), out
        return done[name]

    return run


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_leaves_a_model_its_metrics_and_how_it_was_made(train, folder, command):
    params, records, out = train(command)
    before, config = models.load(folder)
    assert not same(params, before) and models.load(out)[1] == config
    assert [r["step"] for r in records] == [1, 2] and all(r["stage"] == command for r in records)
    about = json.loads((out / "run.json").read_text())
    assert about["command"] == command and about["options"]["learning_rate"] == 1e-2 and "jax" in about["versions"]
    assert {"tokenizer.json", "config.json", "model.safetensors"} <= {p.name for p in out.iterdir()}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_is_bitwise_repeatable(train, command):
    (once, log, _), (again, log_again, _) = train(command), train(command, seed=0)
    assert same(once, again) and log == log_again


EFFECTS = {
    "sft": {
        "epochs": None, "steps": 1, "learning_rate": 1e-3, "warmup": 0.6, "weight_decay": 0.5, "clip": 0.01, "seed": 1,
        "batch_size": 16, "mean": "sequence",
    },
    "dpo": {"beta": 0.5, "label_smoothing": 0.2, "nll": 0.5, "batch_size": 16, "seed": 1},
    "grpo": {
        "group": 4, "updates": 2, "max_new_tokens": 6, "temperature": 0.5, "reward": "number", "kl": 0.5, "seed": 1,
        "mean": ("token", {"max_new_tokens": 12, "temperature": 3.0}), "advantage": "centred",
    },
}  # fmt: skip


@pytest.mark.parametrize("command,option", [(c, o) for c, changes in EFFECTS.items() for o in changes if o != "epochs"])
def test_every_option_of_the_training_changes_the_model(train, command, option):
    value = EFFECTS[command][option]
    value, around = value if isinstance(value, tuple) else (value, {})
    assert not same(train(command, **around)[0], train(command, **around, **{option: value})[0])


@pytest.mark.parametrize("option,value", [("clip_low", 0.0001), ("clip_high", 0.0001)])
def test_the_clip_matters_once_the_policy_has_moved(train, option, value):
    assert not same(train("grpo", updates=3)[0], train("grpo", updates=3, **{option: value})[0])


def test_epochs_are_passes_over_the_data(train, data):
    count = len(pathlib.Path(data["completion"]).read_text().splitlines())
    _, records, _ = train("sft", epochs=2.0, steps=None)
    assert records[-1]["step"] == -(-2 * count // 8)


@pytest.mark.parametrize("changes", [{"microbatches": 2, "batch_size": 16}, {"fsdp": 2}, {"fsdp": 4, "tensor": 1}])
def test_how_the_work_is_split_changes_no_result(train, changes):
    plain = {"batch_size": changes["batch_size"]} if "batch_size" in changes else {}
    for a, b in zip(jax.tree.leaves(train("sft", **plain)[0]), jax.tree.leaves(train("sft", **changes)[0])):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_log_every_changes_when_metrics_are_fetched_and_nothing_else(train, monkeypatch):
    fetched, get = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(x) or get(x))
    once = train("sft", log_every=5)
    often = len(fetched)
    each = train("sft", log_every=1)
    assert len(fetched) - often == often + 1  # two intervals in the place of one
    assert same(once[0], each[0]) and once[1] == each[1]


def test_evaluation_touches_nothing(train, data):
    without, each, rarely = (
        train("grpo"),
        train("grpo", eval_data=data["held_out"], eval_every=1),
        train("grpo", eval_data=data["held_out"], eval_every=5),
    )
    assert same(without[0], each[0]) and same(without[0], rarely[0])
    assert [("eval_reward" in r) for r in each[1]] == [True, True, True]  # before the first step too
    assert [("eval_reward" in r) for r in rarely[1]] == [True, False, True]


def test_the_sampler_and_the_trainer_agree_and_the_first_update_is_on_policy(train):
    for record in train("grpo", updates=1)[1]:
        assert record["sampling/sampling_logp_difference/max"] < 1e-5
        assert record["clip_ratio/low_mean"] == record["clip_ratio/high_mean"] == 0.0


def test_a_run_of_several_updates_compiles_its_step_once(folder, data, reward_file, tmp_path, caplog):
    more = ROLLOUT | {"reward": reward_file, "updates": 2, "kl": 0.1}
    options = {"model": str(folder), "data": data["question"], "out": str(tmp_path / "o")} | BASE | more
    with jax.log_compiles():
        grpo.run(grpo.GRPO(**options), Tracker())
    compiled = [r for r in caplog.messages if "Finished XLA compilation of jit(train_step)" in r]
    assert len(compiled) == 1


def test_a_falling_chosen_probability_is_a_warning(folder, data, tmp_path):
    """Mass that leaves the rejected answers need not go to the chosen ones; a wild rate makes sure that it does not."""
    tracker = Tracker()
    options = {"model": str(folder), "data": data["preference"], "out": str(tmp_path / "o")} | BASE
    last = dpo.run(dpo.DPO(**options | {"learning_rate": 1.0, "steps": 3}), tracker)
    assert last["logps/chosen"] < last["logps/chosen_before"]
    assert len(tracker.warnings) == 1 and "became less likely" in tracker.warnings[0]


BAD = {
    "no model": ({"model": "nowhere"}, "nowhere: no such folder"),
    "no data": ({"data": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
    "rate": ({"learning_rate": 0.0}, "--learning-rate must be above 0"),
    "steps": ({"steps": 0}, "--steps must be above 0"),
    "warm-up": ({"warmup": 1.0}, "--warmup must be in"),
    "microbatches": ({"microbatches": 3}, "--microbatches 3 does not divide --batch-size 8"),
    "batch": ({"batch_size": 4}, "--batch-size 4 must be a multiple of 8"),
    "mesh": ({"fsdp": 3}, "--fsdp 3 x --tensor 1 does not divide 8 devices"),
    "heads": ({"tensor": 4}, "mesh axis tensor=4 does not divide axis 2 of params.layers.wk"),
    "long rows": ({"max_length": 5}, r"completion.jsonl:1: has \d+ tokens, the limit is 5"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(folder, data, tmp_path, case):
    changes, message = BAD[case]
    out = tmp_path / "deep" / "out"
    options = {"model": str(folder), "data": data["completion"], "out": str(out)} | BASE | changes
    with pytest.raises(ValueError, match=message):
        sft.run(sft.SFT(**options))
    assert not out.parent.exists()


def test_questions_that_leave_no_room_for_an_answer_are_refused(folder, data, tmp_path):
    options = {"model": str(folder), "data": data["question"], "out": str(tmp_path / "o")} | BASE
    with pytest.raises(ValueError, match=r"question.jsonl:1: has \d+ tokens and 90 are to be sampled, the limit is 96"):
        grpo.run(grpo.GRPO(**options | {"max_new_tokens": 90}))
    with pytest.raises(ValueError, match="needs at least 2"):
        grpo.run(grpo.GRPO(**options | {"group": 1}))
    for reward, message in {"nothing": "must be number, exact or FILE", "no.py:f": "there is no file no.py"}.items():
        with pytest.raises(ValueError, match=message):
            grpo.run(grpo.GRPO(**options | {"reward": reward}))


def test_a_folder_is_replaced_only_when_asked(folder, data, tmp_path, train):
    out = tmp_path / "out"
    options = {"model": str(folder), "data": data["completion"], "out": str(out)} | BASE
    sft.run(sft.SFT(**options))
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="out: exists and is not empty"):
        sft.run(sft.SFT(**options | {"seed": 3}))
    assert (out / "model.safetensors").read_bytes() == before
    sft.run(sft.SFT(**options | {"seed": 3, "overwrite": True}))
    assert (out / "model.safetensors").read_bytes() != before
    with pytest.raises(ValueError, match="is the model's own folder"):
        sft.run(sft.SFT(**options | {"model": str(out), "overwrite": True}))


def test_the_options_that_are_not_above_are_known():
    """A new option must be put into one of the tests of this file."""
    elsewhere = {
        "model", "data", "out", "overwrite", "epochs", "microbatches", "fsdp", "tensor", "log_every", "max_length",
        "clip_low", "clip_high", "eval_data", "eval_every", *EFFECTS["sft"],
    }  # fmt: skip
    for command, (_, kind, _) in COMMANDS.items():
        assert {f.name for f in dataclasses.fields(kind)} <= elsewhere | set(EFFECTS[command])
