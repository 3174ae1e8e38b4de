"""A small run in a process of its own, to be killed: python kept_run.py FOLDER SIZE KEEP PAUSE.

It says on standard output when it begins, takes a batch, begins to save, and ends; it goes on from what it finds.
"""

import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pt_jax import signals
from pt_jax.tracking.metrics import JsonlLog
from pt_jax.training import averages, checkpoints, init_state, loop, make_train_step

STEPS, EVERY = 12, 2
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))


def loss(params, frozen, batch, key):
    gap = params["w"][None] - batch["x"]
    noise = jax.random.normal(key, gap.shape)
    return jnp.mean(gap**2 + noise * gap) / 4, {"mean": gap.mean() / 2}


STEP = make_train_step(loss, OPTIMIZER, microbatches=2, after=(averages.ema(0.9),))


def batch_of_step(step):
    """Those of steps 4 and 5 are no numbers; the run goes on."""
    x = np.random.default_rng(step).normal(size=(4, 1)).astype(np.float32)
    return {"x": x + (np.nan if step in (3, 4) else 0)}


def new_state(size=8):
    w = {"w": jnp.linspace(-1, 1, size)}
    return init_state(w, OPTIMIZER, jax.random.key(0), averages=w, extra={"beta": 0.1})


def train(folder, size, keep, pause):
    """The run of this folder, from its newest checkpoint."""
    folder.mkdir(exist_ok=True)
    with signals.deferred(), checkpoints.Checkpoints(folder / "checkpoints", keep=keep, warn=print) as saved:
        step, state = saved.newest(), new_state(size)
        if step is not None:
            state = saved.restore(step, state)
            saved.go_on_from(step)

        def slow_batch_of_step(step):
            print("takes", step, flush=True)
            time.sleep(pause)
            return batch_of_step(step)

        def save(step, state, values):
            print("saves", step, flush=True)
            saved.save(step, state, metrics=values)

        with JsonlLog(folder / "metrics.jsonl", step or 0) as log:
            return loop.fit(
                state, STEP, slow_batch_of_step, steps=STEPS, log_every=5, stop=lambda step: signals.asked(),
                on_metrics=lambda step, values: log.log(step, "run", **values),
                save=loop.every(EVERY, save, saved.poll),
            )  # fmt: skip


if __name__ == "__main__":
    print("begins", flush=True)
    size, keep, pause = sys.argv[2:]
    try:
        with signals.watched():
            train(pathlib.Path(sys.argv[1]), int(size), int(keep), float(pause))
    except signals.Stopped as e:
        sys.exit(e.code)
    print("ends", flush=True)
