"""A training command started twice, for two processes with four simulated devices each: one run, and one model."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from several_commands import HEARTBEAT

from pt_jax import models
from pt_jax.commands import dpo, grpo, several, sft
from pt_jax.models import lora
from pt_jax.training import checkpoints

pytestmark = pytest.mark.slow
SCRIPT = pathlib.Path(__file__).parents[1] / "several_commands.py"
STEPS = 4
PATIENCE = 15 * HEARTBEAT  # a third of it where nothing else runs; JAX's own is longer
REWARD = """
import os, signal

calls = 0

def judge(completion, row):
    global calls
    calls += 1
    if calls == int(os.environ.get("CALL", 0)):
        os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
    return None if len(completion) % 11 == 3 else len(completion) % 7 + 0.35
"""
OWN = {  # options of each command, beside those that all have
    "sft": {"fsdp": 8},
    "dpo": {"fsdp": 8, "lora_rank": 2, "quantize": "int8", "fold": True, "nll": 0.1},
    "grpo": {
        "fsdp": 4, "group": 2, "updates": 2, "kl": 0.1, "max_new_tokens": 4, "temperature": 0.7, "eval_every": 2,
        "log_every": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """A PEFT folder whose base is the model."""
    params, config = models.load(folder)
    how, path = lora.Adapter(rank=2), tmp_path_factory.mktemp("adapters") / "tiny"
    random = lambda x: jax.random.normal(jax.random.key(x.size), x.shape) / 8
    adapters = jax.tree.map(random, lora.init(jax.random.key(0), params, how))
    models.peft.save(path, adapters, config, how, base=str(folder))
    return path


@pytest.fixture(scope="module")
def given(folder, adapter, data, tmp_path_factory):
    """The options of a command, but for its --out."""
    rewards = tmp_path_factory.mktemp("rewards") / "mine.py"
    rewards.write_text(REWARD)
    kinds = {"sft": "completion", "dpo": "preference", "grpo": "question"}
    more = {
        "sft": {"eval_data": data["completion"], "average": 0.5},
        "dpo": {"model": str(adapter), "eval_data": data["preference"], "patience": 3, "sync_reference": 2},
        "grpo": {"eval_data": data["held_out"], "reward": f"{rewards}:judge"},
    }

    def given(command):
        all_have = {"model": str(folder), "data": data[kinds[command]], "steps": STEPS, "learning_rate": 1e-2}
        all_have |= {"batch_size": 8, "resume": "auto", "checkpoint_every": 2}
        return all_have | OWN[command] | more.get(command, {})

    return given


@pytest.fixture(scope="module")
def start(given, tmp_path_factory):
    """``start(out, words of process 0, words of process 1)``: both."""
    started, programs = [], tmp_path_factory.mktemp("programs")

    def start(out, *words, command="sft", fault="none", environment=({}, {})):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            where = f"localhost:{free.getsockname()[1]}"
        settings = {
            "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_COMPILATION_CACHE_DIR": str(programs), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
        }  # fmt: skip
        options = given(command) | {"out": str(out), "coordinator": where, "processes": 2}
        flags = ((f"--{name.replace('_', '-')}", str(value)) for name, value in options.items())
        flags = [word for flag, value in flags for word in ([flag] if value == "True" else [flag, value])]
        both = [
            subprocess.Popen(
                [sys.executable, str(SCRIPT), fault, command, *flags, "--process-id", str(i), *more],
                env=os.environ | settings | environment[i], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for i, more in enumerate(words or ([], []))
        ]  # fmt: skip
        started.extend(both)
        return both

    yield start
    for process in started:
        process.kill()


def ended(both):
    texts = [process.communicate(timeout=300)[0] for process in both]
    return [process.returncode for process in both], texts


def weights(out):
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def straight(start, tmp_path_factory):
    """``straight(command)``: the folder of a run that nothing befell, and what each process said."""
    done = {}

    def make(command="sft"):
        if command not in done:
            out = tmp_path_factory.mktemp("straight") / "out"
            codes, texts = ended(start(out, command=command))
            assert codes == [0, 0], texts
            done[command] = out, texts
        return done[command]

    return make


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("command", OWN)
def test_two_processes_train_the_model_of_one(straight, given, tmp_path, command):
    out, _ = straight(command)
    module, kind = {"sft": (sft, sft.SFT), "dpo": (dpo, dpo.DPO), "grpo": (grpo, grpo.GRPO)}[command]
    module.run(kind(**given(command) | {"out": str(tmp_path / "alone")}))
    got, expected = weights(out), weights(tmp_path / "alone")
    assert got.keys() == expected.keys()
    for name in got:
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=1e-5, err_msg=name)
    for mine, other in zip(records(out), records(tmp_path / "alone"), strict=True):
        assert mine.keys() == other.keys()
        noise = {"rewards/accuracies"} if mine["step"] == 1 else set()  # of margins that are 0 but for their rounding
        for name in mine.keys() - {"stage"} - noise:
            np.testing.assert_allclose(mine[name], other[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_what_one_process_has_judged_all_know(straight, given, tmp_path):
    """The samples are of the first prompts of each step, and in the order in which one process has them."""
    out, _ = straight("grpo")
    shown = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(shown) == STEPS * OWN["grpo"]["group"] and {x["step"] for x in shown} == {*range(1, STEPS + 1)}
    known = [x for x in shown if len(x["completion"]) % 11 != 3]
    assert known and all(x["reward"] == len(x["completion"]) % 7 + 0.35 for x in known)


def test_process_0_alone_tells_of_the_run_and_writes(straight):
    out, (first, second) = straight()
    assert "Train step" in first and "Train step" not in second
    assert [record["step"] for record in records(out)] == [0, 1, 2, 3, 4]


def same(out, straight):
    """Bit for bit."""
    got, expected = weights(out), weights(straight)
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)
    assert records(out) == records(straight)


def test_a_signal_in_a_rollout_of_one_process_stops_both_after_it_and_the_run_goes_on(start, straight, tmp_path):
    out, saved = tmp_path / "out", tmp_path / "out.unfinished" / "checkpoints"
    third = 2 + 2 + 2 * 8 + 2 + 3  # of process 1's calls: of a row of each file, an evaluation, two steps, another one
    both = start(out, command="grpo", environment=({}, {"SIGNAL": "SIGTERM", "CALL": str(third)}))
    codes, texts = ended(both)
    assert codes == [75, 75], texts
    assert checkpoints.complete(saved) == [2, 3]
    codes, texts = ended(start(out, command="grpo"))
    assert codes == [0, 0], texts
    same(out, straight("grpo")[0])


@pytest.mark.parametrize(
    ("command", "who", "what", "kept"),
    [
        ("sft", 1, "before the first step", [[]]),
        ("sft", 1, "while arrays are written", [[]]),
        ("sft", 0, "before the manifest", [[]]),
        ("grpo", 1, "in an evaluation", [[], [2]]),  # by when the one of step 2 need not be written
    ],
)
def test_a_process_that_is_killed_ends_the_other_and_the_run_goes_on(
    start, straight, tmp_path, command, who, what, kept
):
    """By default JAX lets the other wait for minutes. What was being written is no checkpoint."""
    out, saved, environment = tmp_path / "out", tmp_path / "out.unfinished" / "checkpoints", [{}, {}]
    environment[who] = {"SIGNAL": "SIGKILL", "CALL": str(2 + 2 + 2 * 8 + 2 + 2 * 8 + 1)}  # in the last evaluation
    both = start(out, command=command, fault=f"{what}@{who}", environment=environment)
    both[who].wait(300)
    said, _ = both[1 - who].communicate(timeout=PATIENCE)
    assert both[who].returncode == -signal.SIGKILL and both[1 - who].returncode not in (0, 75)
    gone = (f"process 1 of 2 has given no sign of life for {HEARTBEAT:g} seconds",)
    if who == 0:
        gone = "process 0 of 2, the coordinator, is gone", "distributed service detected fatal errors"
    assert any(sentence in said for sentence in gone), said
    assert checkpoints.complete(saved) in kept
    codes, texts = ended(start(out, command=command))
    assert codes == [0, 0], texts
    same(out, straight(command)[0])


def test_a_run_that_diverges_ends_both_once_its_batch_and_its_checkpoint_are_written(start, tmp_path):
    """Though process 1 has nothing to write, and is long at its end."""
    words = ["--learning-rate", "1e30", "--bad-steps", "1", "--checkpoint-every", "1"]
    codes, texts = ended(start(tmp_path / "out", words, words, fault="slowly@0"))
    assert codes == [2, 2], texts
    for text in texts:
        assert "pt-jax: the " in text and "failed first" not in text and "Traceback" not in text
    left = tmp_path / "out.unfinished"
    (batch,) = left.glob("bad_step_*.npz")
    assert "tokens" in " ".join(np.load(batch).files)
    assert checkpoints.complete(left / "checkpoints")


def test_a_disk_that_is_full_stops_both_where_it_is_to(start, tmp_path):
    words = ["--on-save-error", "stop"]
    codes, texts = ended(start(tmp_path / "out", words, words, fault="for a full disk@0"))
    assert codes == [2, 2], texts
    for text in texts:
        assert "2 was not written: process 0 of 2: No space left on device" in " ".join(text.split())
        assert "failed first" not in text and "Traceback" not in text


@pytest.mark.parametrize("what", ["options", "inputs"])
def test_what_is_not_the_same_everywhere_is_named(start, data, tmp_path, what):
    """Files may lie elsewhere; what is in them is compared."""
    words, said = ["--weight-decay", "0.5"], "options.weight_decay is 0.0 on process 0 and 0.5 on process 1"
    if what == "inputs":
        words, said = ["--data", str(tmp_path / "other.jsonl")], "inputs.data is '"
        lines = pathlib.Path(data["completion"]).read_text().splitlines()
        (tmp_path / "other.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    codes, texts = ended(start(tmp_path / "out", [], words))
    assert codes == [2, 2], texts
    for text in texts:
        assert said in " ".join(text.split()) and "Traceback" not in text


def test_a_folder_that_is_not_shared_ends_both_before_they_train(start, tmp_path):
    own = tmp_path / "own" / "out"
    codes, texts = ended(start(tmp_path / "out", [], ["--out", str(own)]))
    assert codes == [2, 2], texts
    for text in texts:
        assert f"--out {own} of process 1 is not the folder that process 0 writes to" in " ".join(text.split())
    assert not [*tmp_path.iterdir()]


def test_bad_input_of_one_process_ends_both(start, tmp_path):
    codes, texts = ended(start(tmp_path / "out", [], ["--data", str(tmp_path / "none.jsonl")]))
    assert codes == [1, 2], texts
    assert "none.jsonl" in texts[1] and "process 1 of 2 failed first" in texts[0] and "none.jsonl" in texts[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"process_id": 0}, "^--process-id needs --coordinator$"),
        ({"coordinator": "here:1234", "process_id": 0}, "^--coordinator here:1234 needs --processes$"),
        ({"coordinator": "here", "processes": 2, "process_id": 0}, "^coordinator must be host:port, got 'here'$"),
        ({"coordinator": "here:1", "processes": 2, "process_id": 2}, "^process_id must be from 0 to 1, "),
    ],
)
def test_who_is_who_is_checked_before_anybody_is_waited_for(options, message):
    with pytest.raises(ValueError, match=message), several.joined(several.Several(**options)):
        pass
