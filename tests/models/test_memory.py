"""How much of the host's memory reading and writing a model takes, measured by the kernel in a process of its own.

On the CPU what is placed is in the host's memory as well, so the peak is held against what is placed and 1.3 times the
largest tensor of the files, which is 120 MB: compiling takes some MB too.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

PROGRAM = pathlib.Path(__file__).with_name("memory_of_loading.py")
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "8",
    "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed goes back to the kernel at once, and is not counted again
    "MALLOC_TRIM_THRESHOLD_": "65536",
}

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux for the peak"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Case -> bytes: the peak above what there was before, what is placed, the largest tensor of the files."""
    done = subprocess.run(
        [sys.executable, PROGRAM, tmp_path_factory.mktemp("large")], env=os.environ | ENVIRONMENT, text=True,
        capture_output=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {line.pop("case"): line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("place", ["default", "mesh"])
@pytest.mark.parametrize("types", ["float32 to float32", "float32 to bfloat16", "bfloat16 to float32"])
def test_loading_takes_what_is_placed_and_hardly_more_than_the_largest_tensor(measured, types, place):
    case = measured[f"load {types}, {place}"]
    assert case["largest"] > 60e6 and case["placed"] > 1.5 * case["largest"]
    assert case["peak"] < case["placed"] + 1.3 * case["largest"], case


@pytest.mark.parametrize("types", ["float32 to float32", "bfloat16 to float32"])
def test_under_a_mesh_each_device_has_its_share_alone(measured, types):
    case = measured[f"load {types}, mesh"]
    assert case["devices"] == 8 and case["placed"] < 1.01 * case["parameters"], case


@pytest.mark.parametrize("place", ["default", "mesh"])
def test_saving_takes_some_tensors_and_not_the_model(measured, place):
    case = measured[f"save, {place}"]
    assert case["parameters"] > 300e6 and case["peak"] < case["parameters"] / 4, case
