"""A run in a process of its own is killed, stopped and started again; it ends as the run that nothing happened to."""

import os
import signal
import subprocess
import sys
import time

import jax
import kept_run
import numpy as np
import pytest

from pt_jax.training import checkpoints, specs

SIZE = 1 << 19  # two megabytes a leaf, so that a save takes a while


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """``start(folder, ...)``: the process, whose output is read line by line."""
    programs, started = tmp_path_factory.mktemp("programs"), []

    def start(folder, size=SIZE, keep=2, pause=0.0):
        settings = {
            "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(programs),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "PYTHONHASHSEED": str(len(started)), "PYTHONPATH": os.pathsep.join(sys.path),
        }  # fmt: skip
        words = [sys.executable, kept_run.__file__, str(folder), str(size), str(keep), str(pause)]
        started.append(subprocess.Popen(words, env=os.environ | settings, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The folder of a run that nothing happened to, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert start(folder, keep=99).wait() == 0
    assert checkpoints.complete(folder / "checkpoints") == [2, 4, 6, 8, 10, 12]
    return folder


def wait_for(process, line):
    for said in process.stdout:
        if said.strip() == line:
            return
    pytest.fail(f"the run ended without {line!r}")


def arrays(folder, step):
    like = jax.eval_shape(lambda: kept_run.new_state(SIZE))
    state = specs.flat(checkpoints.restore(folder / "checkpoints" / str(step), like))
    return {name: np.asarray(jax.random.key_data(x) if name == "key" else x) for name, x in state.items()}


def same_state(one, two, step):
    one, two = arrays(one, step), arrays(two, step)
    assert one.keys() == two.keys() and len(one) == 10
    for name, x in one.items():
        np.testing.assert_array_equal(x, two[name], name)


def same_run(whole, folder):
    same_state(whole, folder, 12)
    assert (whole / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["10", "12"]


def killed(start, whole, folder, seed, kills):
    """Killed at random moments, most of them in a save, until so many times; then left to end."""
    rng, newest = np.random.default_rng(seed), 0
    for _ in range(kills):
        process = start(folder, pause=0.02)
        at = newest + 2 * int(rng.integers(0, 3))
        wait_for(process, f"saves {min(at, 10)}" if at > newest else "begins")
        time.sleep(rng.uniform(0, 0.15 if at > newest else 3.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        with checkpoints.Checkpoints(
            folder / "checkpoints", warn=lambda said: pytest.fail(said) if "damaged" in said else None
        ) as saved:
            found = saved.newest() or 0
        # the save before the one that was to begin had not to be complete, the one before that had; nothing went back
        assert found >= max(newest, min(at, 10) - 4 if at > newest else 0)
        newest = found
        if newest:
            same_state(whole, folder, newest)
        if newest >= 10:
            break
    process = start(folder)
    assert process.wait() == 0
    same_run(whole, folder)


def test_a_run_that_was_killed_goes_on_to_the_last_bit(start, whole, tmp_path):
    killed(start, whole, tmp_path / "run", seed=0, kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_whenever_it_was_killed(start, whole, tmp_path, seed):
    killed(start, whole, tmp_path / "run", seed=seed, kills=4)


@pytest.mark.parametrize(("number", "line"), [(signal.SIGTERM, "saves 4"), (signal.SIGINT, "saves 6")])
def test_a_signal_writes_a_checkpoint_of_a_whole_step_and_says_resume_me(start, whole, tmp_path, number, line):
    process = start(tmp_path / "run", pause=0.1)
    wait_for(process, line)
    asked = time.monotonic()
    process.send_signal(number)
    assert process.wait() == 75 and time.monotonic() - asked < 20
    step = checkpoints.complete(tmp_path / "run/checkpoints")[-1]
    assert step >= int(line.split()[1])
    records = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(records) == step
    assert start(tmp_path / "run").wait() == 0
    same_run(whole, tmp_path / "run")


def test_a_second_signal_ends_it_at_once(start, whole, tmp_path):
    process = start(tmp_path / "run", pause=8.0)
    wait_for(process, "takes 0")
    process.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    assert process.wait() == 128 + signal.SIGINT and time.monotonic() - asked < 4
    assert start(tmp_path / "run").wait() == 0
    same_run(whole, tmp_path / "run")
