"""A training command started twice, for two processes with four simulated devices each: one run, and one model."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from pt_jax.commands import grpo, several, sft

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def start(folder, data, tmp_path_factory):
    """``start(out, words of process 0, words of process 1)``: both, in four steps of sft."""
    started, programs = [], tmp_path_factory.mktemp("programs")

    def start(out, *words):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            where = f"localhost:{free.getsockname()[1]}"
        settings = {
            "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_COMPILATION_CACHE_DIR": str(programs), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
        }  # fmt: skip
        command = [sys.executable, "-m", "pt_jax.cli", "sft", "--model", str(folder), "--data", data["completion"]]
        command += ["--out", str(out), "--steps", "4", "--batch-size", "8", "--learning-rate", "1e-2", "--fsdp", "8"]
        command += ["--coordinator", where, "--processes", "2", "--resume", "auto", "--checkpoint-every", "2"]
        both = [
            subprocess.Popen(
                [*command, "--process-id", str(i), *more], env=os.environ | settings, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for i, more in enumerate(words or ([], []))
        ]  # fmt: skip
        started.extend(both)
        return both

    yield start
    for process in started:
        process.kill()


def ended(both):
    texts = [process.communicate(timeout=200)[0] for process in both]
    return [process.returncode for process in both], texts


def weights(out):
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def straight(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "out"
    codes, texts = ended(start(out))
    assert codes == [0, 0], texts
    return out, texts


def test_two_processes_train_the_model_of_one(straight, folder, data, tmp_path):
    out, _ = straight
    sft.run(
        sft.SFT(model=str(folder), data=data["completion"], out=str(tmp_path / "alone"), steps=4, batch_size=8,
                learning_rate=1e-2, fsdp=8)
    )  # fmt: skip
    got, expected = weights(out), weights(tmp_path / "alone")
    assert got.keys() == expected.keys()
    for name in got:
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=1e-5, err_msg=name)
    losses = lambda at: [json.loads(line)["loss"] for line in (at / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(losses(out), losses(tmp_path / "alone"), rtol=1e-5)


def test_process_0_alone_tells_of_the_run_and_writes(straight):
    out, (first, second) = straight
    assert "Train step" in first and "Train step" not in second
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_a_signal_to_one_process_stops_both_at_one_step_and_the_run_goes_on(start, straight, tmp_path):
    out = tmp_path / "out"
    both = start(out)
    saved = tmp_path / "out.unfinished" / "checkpoints"
    limit = time.monotonic() + 150
    while not (tmp_path / "out.unfinished" / "run.json").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    both[1].send_signal(signal.SIGTERM)
    codes, texts = ended(both)
    assert codes == [75, 75], texts
    steps = [int(path.name) for path in saved.iterdir()] if saved.is_dir() else []
    assert all(path.joinpath("MANIFEST.json").exists() for path in saved.glob("*"))
    assert all("stopped by SIGTERM" in text for text in texts) and len(steps) <= 2
    codes, texts = ended(start(out))
    assert codes == [0, 0], texts
    for name, x in weights(straight[0]).items():
        np.testing.assert_array_equal(weights(out)[name], x)


def test_what_is_not_the_same_everywhere_is_named(start, tmp_path):
    codes, texts = ended(start(tmp_path / "out", [], ["--weight-decay", "0.5"]))
    assert codes == [2, 2], texts
    for text in texts:
        assert "options.weight_decay is 0.0 on process 0 and 0.5 on process 1" in text


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


def test_grpo_says_that_it_runs_in_one_process(folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    options = grpo.GRPO(model=str(folder), data=data["question"], out=str(tmp_path / "out"), reward="number")
    with pytest.raises(ValueError, match=r"^--coordinator: grpo reads its samples on one host"):
        grpo.run(options)
    assert not (tmp_path / "out").exists()
