"""What does ``import pt_jax`` cost, beside jax's own import?

    python benchmarks/import_time.py

One JSON line: the median seconds over fresh processes; ``floor`` is ``import jax`` alone, measured in turn with it.
"""

import json
import platform
import statistics
import subprocess
import sys
import time

ROOMS = "import jax; import pt_jax; from pt_jax import losses, objectives, models, sampling, training, recipes"


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main(runs: int = 5):
    for name, code in (("import pt_jax", "import jax; import pt_jax"), ("import of every room", ROOMS)):
        pairs = [(seconds(code), seconds("import jax")) for _ in range(runs)]
        value, floor = (statistics.median(side) for side in zip(*pairs))
        print(json.dumps({
            "name": name, "value": round(value, 3), "unit": "s", "floor": round(floor, 3),
            "share_of_floor": round(floor / value, 3), "versions": {"python": platform.python_version()},
            "config": {"runs": runs}, "device": platform.machine(),
        }))  # fmt: skip


if __name__ == "__main__":
    main()
