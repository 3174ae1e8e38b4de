"""``pt-jax sft``, ``dpo`` and ``grpo``: a folder and a file in, a folder out; every option does something."""

import dataclasses
import json
import math
import pathlib
import shutil
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import jit

from pt_jax import models
from pt_jax.commands import adapters, common, dpo, evaluating, fitting, grpo, keeping, optimizing, several, sft
from pt_jax.data import encode, rows
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
        module, kind, lines = COMMANDS[command]
        name = json.dumps([command, changes], sort_keys=True)
        if name not in done:
            out = tmp_path_factory.mktemp("runs") / "out"
            more = ROLLOUT | {"reward": reward_file} if command == "grpo" else {}
            options = {"model": str(folder), "data": data[lines], "out": str(out)} | BASE | more | changes
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
        "batch_size": 16, "mean": "sequence", "optimizer": "lion", "schedule": "constant", "moments": "bfloat16",
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


def test_every_optimizer_schedule_and_type_of_moments_is_another():
    params = {"embed": jnp.ones((80, 60)), "layers": {"up": jnp.ones((1, 8, 8)), "norm": jnp.ones((1, 8))}}
    slopes = lambda t: jax.tree.map(lambda x: np.float32(np.random.default_rng(t).normal(size=x.shape)), params)
    seen = {}
    choices = [{}] + [{option: value} for option in ("optimizer", "schedule", "moments")
                      for value in typing.get_args(typing.get_type_hints(sft.SFT)[option])[1:]]  # fmt: skip
    for choice in choices:
        optimizer = optimizing.optimizer_of(
            sft.SFT(model="", data="", out="", warmup=0.3, weight_decay=0.1, **choice), 10
        )
        tree, state, update = params, optimizer.init(params), jit(optimizer.update)
        for t in range(10):
            updates, state = update(slopes(t), state, tree)
            tree = optax.apply_updates(tree, updates)
        seen[str(choice)] = np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    assert len({x.tobytes() for x in seen.values()}) == len(choices) == 10


@pytest.mark.parametrize("option,value", [("clip_low", 0.0001), ("clip_high", 0.0001)])
def test_the_clip_matters_once_the_policy_has_moved(train, option, value):
    assert not same(train("grpo", updates=3)[0], train("grpo", updates=3, **{option: value})[0])


def test_epochs_are_passes_over_the_data(train, data):
    count = len(pathlib.Path(data["completion"]).read_text().splitlines())
    _, records, _ = train("sft", epochs=2.0, steps=None)
    assert records[-1]["step"] == -(-2 * count // 8)


SPLITS = [{"microbatches": 2, "batch_size": 16}, {"fsdp": 2}, {"fsdp": 2, "context": 4}, {"expert": 2}]


@pytest.mark.parametrize(
    ("command", "changes"),
    [*(("sft", changes) for changes in SPLITS), ("grpo", {"context": 2, "max_new_tokens": 5})],  # of odd rows
)
def test_how_the_work_is_split_changes_no_result(train, command, changes):
    plain = {name: value for name, value in changes.items() if name in ("batch_size", "max_new_tokens")}
    for a, b in zip(jax.tree.leaves(train(command, **plain)[0]), jax.tree.leaves(train(command, **changes)[0])):
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


def chosen_logps(folder, file):
    """The mean log-probability of all chosen answers of a file, a pair at a time."""
    model = common.open_model(folder)
    apply, total = jax.jit(model.apply), []
    for row in rows.read(file, kinds=("preference",)):
        chosen, _ = encode.preference(model.tokenizer, row)
        at = np.flatnonzero(chosen.mask)
        tokens = np.resize(chosen.tokens, 64)  # what follows an answer does not matter to it
        logits = apply(model.params, tokens[None], np.ones((1, 64), bool))[0][0]
        total.append(np.asarray(jax.nn.log_softmax(logits))[at - 1, tokens[at]].sum())
    return np.mean(total)


def test_the_chosen_answers_are_compared_over_all_the_data_and_after_the_last_update(folder, data, tmp_path):
    """The last step's own metric is of its batch alone, before its update: it may fall while the others rise."""
    tracker = Tracker()
    options = {"model": str(folder), "data": data["preference"], "out": str(tmp_path / "o"), "nll": 10.0} | BASE
    last = dpo.run(dpo.DPO(**options), tracker)
    before, after = (chosen_logps(path, data["preference"]) for path in (folder, tmp_path / "o"))
    np.testing.assert_allclose([last["logps/chosen_before"], last["logps/chosen_after"]], [before, after], rtol=1e-4)
    assert abs(last["logps/chosen"] - after) > 1e-2 * abs(after)
    assert after > before and not tracker.warnings


def test_a_falling_chosen_probability_is_a_warning(folder, data, tmp_path):
    """Mass that leaves the rejected answers need not go to the chosen ones; a wild rate makes sure that it does not."""
    tracker = Tracker()
    options = {"model": str(folder), "data": data["preference"], "out": str(tmp_path / "o")} | BASE
    last = dpo.run(dpo.DPO(**options | {"learning_rate": 1.0}), tracker)
    assert last["logps/chosen_after"] < last["logps/chosen_before"]
    assert len(tracker.warnings) == 1 and "became less likely" in tracker.warnings[0]


BAD = {
    "no model": ("sft", {"model": "nowhere"}, "nowhere: no such folder"),
    "no data": ("sft", {"data": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
    "rate": ("sft", {"learning_rate": 0.0}, "--learning-rate must be above 0"),
    "endless rate": ("sft", {"learning_rate": math.inf}, r"--learning-rate must be in \[0.0, inf\), got inf"),
    "endless epochs": ("sft", {"epochs": math.inf, "steps": None}, "--epochs must be in"),
    "steps": ("sft", {"steps": 0}, "--steps must be above 0"),
    "warm-up": ("sft", {"warmup": 1.0}, "--warmup must be in"),
    "decay": ("sft", {"weight_decay": -1.0}, "--weight-decay must be in"),
    "clip": ("sft", {"clip": 0.0}, "--clip must be above 0"),
    "seed": ("sft", {"seed": -1}, r"--seed must be in \[0, 4294967296\), got -1"),
    "moments": ("sft", {"moments": "8bit", "optimizer": "sgd"}, "--moments 8bit is of .* that has moments; sgd"),
    "microbatches": ("sft", {"microbatches": 3}, "--microbatches 3 does not divide --batch-size 8"),
    "batch": ("sft", {"batch_size": 4}, "--batch-size 4 must be a multiple of 8"),
    "mesh": ("sft", {"fsdp": 3}, "--fsdp 3 does not divide 8 devices"),
    "heads": ("sft", {"tensor": 4}, "mesh axis tensor=4 does not divide axis 2 of layers.wk, which is 1"),
    "long rows": ("sft", {"max_length": 5}, r"completion.jsonl:1: has \d+ tokens, the limit is 5"),
    "no length": ("sft", {"max_length": 0}, "--max-length must be above 0"),
    "no length of a pair": ("dpo", {"max_length": -5}, "--max-length must be above 0"),
    "beta": ("dpo", {"beta": 0.0}, "--beta must be above 0"),
    "labels": ("dpo", {"label_smoothing": 0.7}, r"--label-smoothing must be in \[0.0, 0.5\), got 0.7"),
    "nll": ("dpo", {"nll": -1.0}, "--nll must be in"),
    "low clip": ("grpo", {"clip_low": 1.5}, r"--clip-low must be in \[0.0, 1.0\), got 1.5"),
    "high clip": ("grpo", {"clip_high": -0.1}, "--clip-high must be in"),
    "kl": ("grpo", {"kl": -1.0}, "--kl must be in"),
    "temperature": ("grpo", {"temperature": 0.0}, "--temperature must be above 0"),
    "updates": ("grpo", {"updates": 0}, "--updates must be above 0"),
    "group": ("grpo", {"group": 1}, "needs at least 2"),
    "room": (
        "grpo", {"max_new_tokens": 90},
        r"question.jsonl:1: has \d+ tokens and 90 are to be sampled, the limit is 96",
    ),
    "reward": ("grpo", {"reward": "nothing"}, "must be number, exact or FILE"),
    "no file": ("grpo", {"reward": "no.py:f"}, "there is no file no.py"),
    "no Python": ("grpo", {"reward": "{rewards}.txt:f"}, r"rewards.txt is no Python file; its name must end in .py"),
    "no function": ("grpo", {"reward": "{rewards}.py:g"}, r"rewards.py has no function g"),
    "a list": ("grpo", {"reward": "{rewards}.py:a_list"}, r"question.jsonl:1: the reward must be .* returned \[1.0\]"),
    "a text": ("grpo", {"reward": "{rewards}.py:a_text"}, r"question.jsonl:1: the reward must be .* returned '1.0'"),
    "an array": ("grpo", {"reward": "{rewards}.py:an_array"}, r"question.jsonl:1: the reward must be .* array\(\[1"),
    "no number": ("grpo", {"data": "{rewards}.jsonl"}, r"rewards.jsonl:2: the answer must name one .*, got 'Llama'"),
    "no number held out": ("grpo", {"eval_data": "{rewards}.jsonl"}, r"rewards.jsonl:2: the answer must name one"),
}  # fmt: skip


@pytest.fixture(scope="module")
def strange_rewards(tmp_path_factory):
    """Files named "rewards" that no run can use."""
    stem = tmp_path_factory.mktemp("strange") / "rewards"
    code = (
        "import numpy as np\n"
        "a_list = lambda completion, row: [1.0]\n"
        "a_text = lambda completion, row: '1.0'\n"
        "an_array = lambda completion, row: np.ones(1)\n"
    )
    stem.with_suffix(".py").write_text(code)
    stem.with_suffix(".txt").write_text(code)
    rows.write_jsonl(stem.with_suffix(".jsonl"), [{"prompt": "a", "answer": n} for n in ("4", "Llama")])
    return str(stem)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(folder, data, strange_rewards, tmp_path, case):
    command, changes, message = BAD[case]
    module, kind, lines = COMMANDS[command]
    changes = {k: v.format(rewards=strange_rewards) if isinstance(v, str) else v for k, v in changes.items()}
    out = tmp_path / "deep" / "out"
    options = {"model": str(folder), "data": data[lines], "out": str(out)} | BASE | changes
    with pytest.raises(ValueError, match=message):
        module.run(kind(**options))
    assert not out.parent.exists()


def test_what_a_reward_says_is_a_number(folder):
    row = {"source": "x:1"}
    for said, number in (
        (1, 1.0),
        (True, 1.0),
        (np.float32(0.5), 0.5),
        (np.bool_(True), 1.0),
        (jax.numpy.ones(()), 1.0),
    ):
        got = grpo.judge(lambda *_, said=said: said, "", row)
        assert got == number and type(got) is float
    assert math.isnan(grpo.judge(lambda *_: None, "", row))  # no verdict
    with pytest.raises(
        ValueError, match=r"x:1: the reward must be a number or None, but the function returned \(1, 2\)"
    ):
        grpo.judge(lambda *_: (1, 2), "", row)


def test_a_reward_of_ones_own_is_tried_on_one_row_and_a_known_one_on_all():
    """The first may ask a server; the second only reads the answers."""
    data, asked = [{"answer": 1, "source": str(i)} for i in range(3)], []
    grpo.try_reward("mine.py:f", lambda text, row: asked.append((text, row["source"])) or 0.0, data, data[1:], [])
    assert asked == [("", "0"), ("", "1")]
    with pytest.raises(ValueError, match="9: the answer must name one number"):
        grpo.try_reward("number", grpo.REWARDS["number"], data, [*data, {"answer": "?", "source": "9"}])


@pytest.fixture
def earlier(folder, data, tmp_path):
    """An earlier run's folder, with everything in it that a run may read."""
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    (out / "metrics.jsonl").write_text("old")
    (out / "reward.py").write_text("f = lambda completion, row: 1.0")
    shutil.copy(data["completion"], out / "rows.jsonl")
    shutil.copy(data["question"], out / "questions.jsonl")
    return out


@pytest.mark.parametrize(
    ("command", "option", "name"),
    [
        ("sft", "model", ""),
        ("sft", "data", "rows.jsonl"),
        ("grpo", "eval_data", "questions.jsonl"),
        ("grpo", "reward", "reward.py:f"),
    ],
)
def test_nothing_that_a_run_reads_is_replaced(folder, data, earlier, command, option, name):
    module, kind, lines = COMMANDS[command]
    before = bytes_of(earlier)
    options = {"model": str(folder), "data": data[lines], "out": str(earlier), "overwrite": True} | BASE
    flag = "--" + option.replace("_", "-")
    with pytest.raises(ValueError, match=rf"^--out \S+ would replace {flag} {earlier}"):
        module.run(kind(**options | {option: str(earlier / name)}))
    assert bytes_of(earlier) == before


def bytes_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_folder_is_replaced_only_when_asked_and_by_a_whole_run(folder, data, earlier):
    options = {"model": str(folder), "data": data["completion"], "out": str(earlier)} | BASE
    before = bytes_of(earlier)
    with pytest.raises(ValueError, match="out: exists and is not empty"):
        sft.run(sft.SFT(**options))
    assert bytes_of(earlier) == before
    sft.run(sft.SFT(**options, overwrite=True))
    after = bytes_of(earlier)
    assert after["model.safetensors"] != before["model.safetensors"] and "rows.jsonl" not in after
    assert len(metrics.read(earlier / "metrics.jsonl")) == 2 and "run.json" in after
    assert [p.name for p in earlier.parent.iterdir()] == ["out"]


def stopped(fit, *_):
    raise KeyboardInterrupt


def spoiled(fit, *_):
    """Ends with a parameter that is not a number, as a last update can whose loss was fine before it."""
    fit.state = fit.state.replace(params=jax.tree.map(lambda x: x * math.nan, fit.state.params))


@pytest.mark.parametrize(
    ("run", "error", "said"),
    [
        (stopped, KeyboardInterrupt, None),
        (spoiled, FloatingPointError, r"embed is not finite, so nothing is saved; a lower"),
    ],
)
@pytest.mark.parametrize("again", [False, True])
def test_a_run_that_fails_saves_nothing_and_loses_nothing(folder, data, earlier, monkeypatch, run, error, said, again):
    out = earlier if again else earlier.with_name("new")
    monkeypatch.setattr(fitting.Fit, "run", run)
    before = bytes_of(earlier)
    with pytest.raises(error, match=said):
        sft.run(sft.SFT(model=str(folder), data=data["completion"], out=str(out), overwrite=again, **BASE))
    assert bytes_of(earlier) == before
    assert {p.name for p in out.parent.iterdir()} == {"out", out.name + ".unfinished"}


def test_the_options_that_are_not_above_are_known():
    """A new option must be put into one of the tests of this file."""
    elsewhere = {
        "model", "data", "out", "overwrite", "epochs", "microbatches", "log_every", "max_length", *common.AXES,
        "clip_low", "clip_high", *EFFECTS["sft"],
        "rates", "no_decay", "lora_plus", "average", "skip_spikes", "spike_window",  # test_optimizing.py
        "sync_reference", "sync_alpha",  # test_optimizing.py
        *(f.name for f in dataclasses.fields(evaluating.Evaluating)),  # test_evaluating.py
        "lora_rank", *adapters.FLAGS,  # test_adapters.py
        "remat", "dtype", "packing", "share_prompts",  # test_execution.py
        "slots",  # test_slots.py
        *several.OWN,  # test_several.py
        *(f.name for f in dataclasses.fields(keeping.Keeping)),  # test_keeping.py
    }  # fmt: skip
    for command, (_, kind, _) in COMMANDS.items():
        assert {f.name for f in dataclasses.fields(kind)} <= elsewhere | set(EFFECTS[command])
