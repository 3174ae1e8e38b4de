"""What the benchmarks share: timing, the machine's own limits, and the line that each result is printed as."""

import json
import subprocess
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp


def best(run, repeats: int = 5) -> float:
    """The shortest of several runs, in seconds: noise on a shared machine only ever adds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)


def peak(n: int = 2048) -> float:
    """Operations a second of a float32 product of n x n matrices."""
    a = jnp.ones((n, n))
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, a))
    return 2 * n**3 / best(partial(product, a, a))


def bandwidth(n: int = 2**26) -> float:
    """Bytes a second read by adding up n float32 numbers, far more than a cache holds.

    What is written would be new pages of memory each time, which cost three times as much on a CPU: weights and caches
    are read, again and again, from where they are.
    """
    x = jnp.ones(n)
    add = jax.jit(jnp.sum)
    jax.block_until_ready(add(x))
    return 4 * n / best(partial(add, x))


def in_a_process(file, side: str, **flags) -> dict | None:
    """What a benchmark prints last, a JSON line, when it is run for one of its sides; None, and why, if it does not."""
    command = [sys.executable, file, "--side", side]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{side} did not run: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def report(name: str, value: float, unit: str, floor: float, config: dict, **more):
    """One JSON line. ``floor`` is the same work at the machine's measured limit, in the same unit."""
    share = floor / value if unit in ("s", "us", "ms") else value / floor  # of times, and of rates
    print(json.dumps({
        "name": name, "value": float(f"{value:.4g}"), "unit": unit, "floor": float(f"{floor:.4g}"),
        "share_of_floor": round(share, 3), **more, "config": config, "versions": {"jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
    }))  # fmt: skip
