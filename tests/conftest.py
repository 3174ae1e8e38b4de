"""Every setting of the tests: eight CPU devices, JAX at its strictest, examples that are the same every time.

The programs of tests take longer to compile than to run, so they are compiled in a quarter of the time, with fewer
optimisations. ``XLA_FLAGS= pytest`` compiles them as users do.
"""

import json
import os
import pathlib
from types import SimpleNamespace

import hypothesis
import jax
import numpy as np
import pytest

QUICK = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):  # later ones end on this flag: they have no other way to write a fusion
    QUICK.append("--xla_cpu_use_fusion_emitters=false")
# eight devices that share two busy cores may keep each other waiting for longer than XLA's 40 seconds
QUICK.append("--xla_cpu_collective_call_terminate_timeout_seconds=600")
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK))
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")  # [B] against [B, T] is a mistake until an axis is written
jax.config.update("jax_numpy_dtype_promotion", "standard")

# A new shape is a new compilation, so an example may be slow without being wrong: no deadline.
hypothesis.settings.register_profile("stable", max_examples=25, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("stable")


collect_ignore = ["several_processes.py"]  # a program for processes of their own, which reads its arguments at once


@pytest.fixture(autouse=True, scope="module")
def programs_end_with_their_module():
    """Thousands of compiled programs would fill the memory of a small machine."""
    yield
    jax.clear_caches()


REFERENCE = pathlib.Path(__file__).parent / "reference"


@pytest.fixture(scope="session")
def trl():
    """``trl(name)``: options, inputs, outputs and metrics of a case that TRL's own code computed."""
    cases = {e["name"]: e for e in json.loads((REFERENCE / "trl_1_16.json").read_text())["entries"]}
    arrays = np.load(REFERENCE / "trl_1_16.npz")

    def case(name):
        c = cases[name]
        inputs, outputs = ({k: arrays[v] for k, v in c[kind].items()} for kind in ("inputs", "outputs"))
        return SimpleNamespace(
            options=SimpleNamespace(**c["options"]),
            inputs=SimpleNamespace(**inputs),
            outputs=SimpleNamespace(**outputs),
            metrics=c.get("metrics", {}),
        )

    return case


@pytest.fixture(scope="session")
def slope():
    """``slope(f, x)``: central differences of a scalar function of a float64 array, knowing nothing of JAX."""

    def differences(f, x, step=1e-6):
        x = np.asarray(x, np.float64)
        out = np.zeros_like(x)
        for i in np.ndindex(x.shape):
            up, down = x.copy(), x.copy()
            up[i] += step
            down[i] -= step
            out[i] = (f(up) - f(down)) / (2 * step)
        return out

    return differences
