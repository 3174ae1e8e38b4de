"""Two processes with four simulated devices each, over gloo: the numbers of one, and one end for both."""

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

from pt_jax import models

SCRIPT = pathlib.Path(__file__).parents[1] / "several_processes.py"
HEARTBEAT = 4.0  # of the script
PATIENCE = 15 * HEARTBEAT  # a third of it where nothing else runs; JAX's own is longer


def start(what, count, folder):
    """The processes, whose output goes to files in the folder."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # compiles sooner
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), what, str(port), str(count), str(i), str(folder)], env=env,
            stdout=(folder / f"{what}{count}.{i}").open("w"), stderr=subprocess.STDOUT,
        )
        for i in range(count)
    ]  # fmt: skip


def ended(processes, seconds=300):
    """Exit codes and outputs of all, which must end by themselves."""
    limit = time.monotonic() + seconds
    try:
        codes = [process.wait(max(0.1, limit - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return codes


def outputs(what, count, folder):
    return [(folder / f"{what}{count}.{i}").read_text() for i in range(count)]


def run(what, count, folder):
    codes = ended(start(what, count, folder))
    texts = outputs(what, count, folder)
    assert codes == [0] * count, texts
    return [[json.loads(line[5:]) for line in text.splitlines() if line.startswith("SAID ")] for text in texts]


def test_processes_that_begin_differently_are_told_what_differs(tmp_path):
    """And the coordinator does not keep what all have heard."""
    first, second = run("same", 2, tmp_path)
    assert first == second == [
        {"stopped": [None, None, None, None, "SIGTERM", None]},
        {"kept": True},
        {"error": "batch is (16, 8) on process 0 and (16, 12) on process 1; start all with the same"},
        {"error": "config.vocab is 32 on process 0 and 33 on process 1; start all with the same"},
        {"error": "step is 3 on process 0 and 4 on process 1; start all with the same"},
    ]  # fmt: skip


def test_a_checkpoint_that_one_process_cannot_write_is_told_by_all_and_the_next_are_whole(tmp_path):
    """Neither waits for the other, whether its part of the arrays or the manifest is missing."""
    first, second = run("unwritten", 2, tmp_path)
    assert first == second == [
        {"told": ["process 1 of 2: File too large", "process 0 of 2: No space left on device"]},
        {"whole": [3, 4], "left": ["3", "4"]},
        {"raised": True},
    ]  # fmt: skip


def test_a_checkpoint_that_one_process_does_not_begin_ends_all(tmp_path):
    """Orbax waits for it among the devices, and cannot be told."""
    codes = ended(start("midway", 2, tmp_path))
    first, second = outputs("midway", 2, tmp_path)
    assert codes == [1, 2], (first, second)
    said = f"checkpoint {tmp_path / 'saved' / '1'} was not written, and not all processes know it: Not a directory"
    assert f"process 1 of 2 failed first, and all end: {said}" in first and said in second


def test_an_error_that_all_share_waits_for_what_one_has_to_write(tmp_path):
    codes = ended(start("diverge", 2, tmp_path))
    texts = outputs("diverge", 2, tmp_path)
    assert (tmp_path / "batch").read_text() == "whole"
    assert codes == [1, 1]
    for text in texts:
        assert "FloatingPointError: the loss of step 3 is nan" in text and "failed first" not in text


@pytest.mark.slow
def test_each_process_reads_the_weights_that_its_devices_will_hold(tmp_path):
    """All of it, where each holds all; on the mesh of 8, of the tensors that are split, half."""
    sizes = {"layers": 2, "width": 2048, "heads": 2, "kv_heads": 2, "head_width": 8, "hidden": 64, "vocab": 512}
    mixture = {"experts": 8, "experts_per_token": 2, "expert_hidden": 64}
    for name, more in {"dense": {}, "mixture": mixture}.items():
        config = models.Config(**sizes | more)
        models.save(tmp_path / name, models.init(config, jax.random.key(0)), config)
    first, second = run("read", 2, tmp_path)
    for name in ("fsdp", "tensor", "expert"):
        got = load_file(tmp_path / f"{name}.read" / "model.safetensors")
        expected = load_file(tmp_path / ("mixture" if name == "expert" else "dense") / "model.safetensors")
        assert got.keys() == expected.keys()
        for tensor, x in expected.items():
            np.testing.assert_array_equal(got[tensor], x, err_msg=tensor)
    for said in (first, second):
        shares = {line["mesh"]: line["share"] for line in said}
        assert 0.5 < shares["fsdp"] < 0.51 and shares["tensor"] > 0.99
        assert 0.5 < shares["expert"] < 0.9  # attention and embeddings are whole


@pytest.mark.slow
def test_a_model_is_written_by_one_process_which_has_a_layer_of_the_others_at_a_time(tmp_path):
    """Each layer of each weight comes once, though the tensors of experts are written one by one."""
    first, second = run("write", 2, tmp_path)
    assert first == second and [line["mesh"] for line in first] == ["fsdp", "tensor", "expert"]
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    for said in first:
        assert said["least"] and 6 <= said["pieces"] <= 40
        got = load_file(tmp_path / said["mesh"] / "model.safetensors")
        assert got.keys() == expected.keys()
        for tensor, x in expected.items():
            np.testing.assert_array_equal(got[tensor], x, err_msg=tensor)


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path):
    first, second = run("train", 2, tmp_path)
    (alone,) = run("train", 1, tmp_path)
    assert [x["losses"] for x in first] == [x["losses"] for x in second]
    for got, expected in zip(first, alone):
        np.testing.assert_allclose(got["losses"], expected["losses"], rtol=1e-6)
    for mesh in ("fsdp", "context"):
        got, expected = (np.load(tmp_path / f"{mesh}{count}.npz") for count in (2, 1))
        assert got.files == expected.files
        for name in got.files:
            np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=2e-6, err_msg=name)
    every = list(range(16))
    assert [x[0]["rows"] for x in (first, second)] == [every[:8], every[8:]]  # each reads its own
    assert [x[1]["rows"] for x in (first, second)] == [every, every]


@pytest.mark.slow
def test_checkpoints_are_read_by_another_number_of_processes(tmp_path):
    """What is read is what was written, to the last bit; the steps after it are those of the run that went on."""
    for count in (1, 2):
        run("begin", count, tmp_path)
    (alone,), (first, second) = (run("go_on", count, tmp_path) for count in (1, 2))
    assert first == second and [x["number"] for x in first + alone] == [2] * 4
    numbers = lambda name: dict(np.load(tmp_path / f"{name}.npz"))
    for of in (1, 2):
        written, straight = numbers(f"saved{of}"), numbers(f"straight{of}")
        for by in (1, 2):
            read, resumed = numbers(f"read{of}by{by}"), numbers(f"of{of}on{by}")
            assert read.keys() == written.keys()
            for name in written:
                np.testing.assert_array_equal(read[name], written[name])
                exact = 0 if of == by else 1e-6
                np.testing.assert_allclose(resumed[name], straight[name], rtol=0, atol=exact, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["1-raise", "0-raise", "1-kill", "0-kill", "1-stop"])
def test_a_process_that_fails_ends_all(tmp_path, case):
    """At once, or once it has been silent for a heartbeat; by default JAX lets the others wait for minutes."""
    folder = tmp_path / case
    folder.mkdir()
    processes = start("fault", 2, folder)
    who, kind = int(case[0]), case[2:]
    ready = [folder / f"ready{i}" for i in range(2)]
    limit = time.monotonic() + 120
    while not all(file.exists() for file in ready) and time.monotonic() < limit:
        time.sleep(0.1)
    assert all(file.exists() for file in ready), outputs("fault", 2, folder)
    if kind != "raise":
        os.kill(processes[who].pid, {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[kind])
    try:
        code = processes[1 - who].wait(PATIENCE)
        assert kind != "raise" or processes[who].wait(PATIENCE) == 1
    finally:
        for process in processes:
            process.kill()
    assert code != 0
    said = outputs("fault", 2, folder)[1 - who]
    if kind == "raise":
        assert f"process {who} of 2 failed first, and all end: ValueError: row 7 is bad" in said
    elif who == 1:
        assert f"process 1 of 2 has given no sign of life for {HEARTBEAT:g} seconds" in said
    else:
        assert "process 0 of 2, the coordinator, is gone" in said or "distributed service detected fatal errors" in said
