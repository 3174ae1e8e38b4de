"""The commands themselves, killed at any moment and started again, end with the bytes of a run that nothing befell."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from pt_jax.tracking import metrics
from pt_jax.training import checkpoints

pytestmark = pytest.mark.slow
OUT = "läufe α/out"  # below the folder that the command runs in
OWN = {
    "sft": ("completion", ["--batch-size", "16", "--microbatches", "2"]),
    "dpo": ("preference", ["--batch-size", "8", "--nll", "0.1"]),
    "grpo": ("question", [
        "--batch-size", "4", "--group", "2", "--updates", "2", "--kl", "0.1", "--max-new-tokens", "4", "--reward",
        "mine.py:f",
    ]),
}  # fmt: skip
REWARD = """
import os, pathlib, time

calls = 0

def f(completion, row):
    global calls
    calls += 1
    if calls == int(os.environ.get("HANG_AT", 0)):
        pathlib.Path("hangs").touch()
        time.sleep(600)
    return float(len(completion) % 7) + 0.35
"""


@pytest.fixture(scope="module")
def start(folder, data, tmp_path_factory):
    """``start(command, folder to run in, ...)``: the process."""
    programs, started = tmp_path_factory.mktemp("programs"), []

    def start(command, at, *words, **environment):
        (at / "mine.py").write_text(REWARD)
        settings = {
            "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(programs),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "PYTHONHASHSEED": str(len(started)), "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
        }  # fmt: skip
        rows, own = OWN[command]
        given = ["--model", str(folder), "--data", data[rows], "--out", OUT, "--steps", "12", "--learning-rate", "1e-2"]
        given += ["--checkpoint-every", "2", "--resume", "auto", *own, *words]
        process = subprocess.Popen(
            [sys.executable, "-m", "pt_jax.cli", command, *given], cwd=at, env=os.environ | settings | environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


@pytest.fixture(scope="module")
def straight(start, tmp_path_factory):
    done = {}

    def make(command):
        if command not in done:
            done[command] = tmp_path_factory.mktemp("straight")
            said, _ = (process := start(command, done[command])).communicate(timeout=600)
            assert process.returncode == 0, said
        return done[command] / OUT

    return make


def until(condition, process, patience=300):
    end = time.monotonic() + patience
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.01)


def same(one, two):
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert [r["step"] for r in metrics.read(two / "metrics.jsonl")] == [*range(1, 13)]
    assert [path.name for path in two.parent.iterdir()] == ["out"]  # and nothing of a process that was killed


@pytest.mark.parametrize("command", OWN)
def test_a_command_that_is_killed_again_and_again_ends_the_same(start, straight, tmp_path, command):
    whole, rng = straight(command), np.random.default_rng(len(command))
    kept, newest, killed = tmp_path / f"{OUT}.unfinished/checkpoints", 0, 0
    for _ in range(3):
        process = start(command, tmp_path)
        until(lambda: checkpoints.complete(kept)[-1:] > [newest], process)  # noqa: B023
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not kept.exists() or checkpoints.complete(kept)[-1] == 12:
            break
        newest, killed = checkpoints.complete(kept)[-1], killed + 1
    assert killed
    said, _ = (process := start(command, tmp_path, "--overwrite")).communicate(timeout=600)
    assert process.returncode == 0 and "damaged" not in said, said
    same(whole, tmp_path / OUT)


def test_a_rollout_that_is_killed_in_the_middle_is_made_again(start, straight, tmp_path):
    whole = straight("grpo")
    process = start("grpo", tmp_path, HANG_AT=str(5 * 8 + 3 + 10))  # in the sixth step; 10 are asked before the first
    until(lambda: (tmp_path / "hangs").exists(), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoints.complete(tmp_path / f"{OUT}.unfinished/checkpoints")[-1] == 4
    assert start("grpo", tmp_path).wait() == 0
    same(whole, tmp_path / OUT)


def catches(process, number) -> bool:
    """Whether the process has a handler for a signal (Linux says so)."""
    said = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    mask = next(line.split()[1] for line in said.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="asks Linux for the handlers of a process")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_every_phase_ends_in_resume_me(start, straight, tmp_path, number):
    whole, kept = straight("grpo"), tmp_path / f"{OUT}.unfinished/checkpoints"
    phases = {
        "import": (lambda process: catches(process, signal.SIGTERM), {}),
        "first step": (lambda process: kept.parent.exists(), {}),
        "steady": (lambda process: checkpoints.complete(kept) != there, {}),
        "rollout": (lambda process: (tmp_path / "hangs").exists(), {"HANG_AT": "30"}),
    }
    for phase, (reached, environment) in phases.items():
        there = checkpoints.complete(kept)  # what an earlier phase left says nothing of this one
        process = start("grpo", tmp_path, **environment)
        until(lambda: catches(process, signal.SIGTERM) and reached(process), process)  # noqa: B023
        process.send_signal(number)
        if phase == "rollout":  # which would not end by itself: the second signal ends it at once
            time.sleep(0.5)
            process.send_signal(number)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == (128 + number if phase == "rollout" else 75), (phase, said)
        if phase in ("first step", "steady"):
            assert f"stopped by {number.name}; start it again with --resume auto" in said
    assert start("grpo", tmp_path).wait() == 0
    same(whole, tmp_path / OUT)
