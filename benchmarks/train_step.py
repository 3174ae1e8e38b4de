"""How fast is a training step, against the machine's own matrix products?

    python benchmarks/train_step.py

One JSON line: tokens a second of an SFT step of the quickstart's model, and the floor: the same matrix products (6
operations a parameter and token, and those of attention) at the rate that a large product reaches in the same run.
"""

import jax
import numpy as np
from common import best, peak, report

from pt_jax import models, training
from pt_jax.recipes import sft
from pt_jax.training import optimizers, schedules

CONFIG = models.Config(vocab=512, layers=4, width=160, heads=5, kv_heads=5, head_width=32, hidden=432, tied=False)
ROWS, LENGTH, STEPS = 16, 64, 20


def main():
    params = models.init(CONFIG, jax.random.key(0))
    optimizer = optimizers.adamw(schedules.linear(1e-3, STEPS))
    step = training.make_train_step(sft.make_loss(models.bind(CONFIG).apply), optimizer)
    examples = np.random.default_rng(0).integers(0, CONFIG.vocab, (ROWS, LENGTH), dtype=np.int32)
    batch = {"tokens": examples, "seen": np.ones_like(examples, bool), "mask": np.ones_like(examples, bool)}
    batch["mask"][:, 0] = False
    batch["weights"] = batch["mask"] / batch["mask"].sum(dtype=np.float32)
    state = training.init_state(params, optimizer, jax.random.key(0))
    state, _ = step(state, None, batch)

    def steps():
        nonlocal state
        for _ in range(STEPS):
            state, metrics = step(state, None, batch)
        return metrics

    seconds = best(steps) / STEPS
    count = models.parameters.count(params)
    matrices = count - CONFIG.vocab * CONFIG.width  # looking an embedding up multiplies nothing
    attention = 2 * CONFIG.layers * LENGTH * CONFIG.heads * CONFIG.head_width  # q k and p v, a token
    operations = 6 * (matrices + attention) * ROWS * LENGTH
    rate, floor = ROWS * LENGTH / seconds, ROWS * LENGTH * peak() / operations
    config = {"parameters": count, "rows": ROWS, "length": LENGTH}
    report("train_step/sft", rate, "tokens/s", floor, config)


if __name__ == "__main__":
    main()
