"""What do the losses cost? Chunked against plain log-probabilities, and every preference loss.

    python benchmarks/losses.py

One JSON line each. Log-probabilities: seconds of a value and its gradients, the floor being the products with the
unembedding (2 operations a weight and token forwards, 4 backwards) at the rate of a large product in the same run, and
the temporary memory of the compiled program in MiB. Preference losses: microseconds of a value and its gradients over
a million pairs, the floor being to read the arguments and write the gradients once.
"""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from common import bandwidth, best, peak, report

from pt_jax import logps
from pt_jax.losses import preference

ROWS, LENGTH, VOCAB, WIDTH = 4, 256, 32_768, 512
PAIRS = 2**20


def plain(hidden, unembed, tokens):
    return logps.token_logps(jnp.einsum("btd,vd->btv", hidden, unembed), tokens).sum()


def chunked(hidden, unembed, tokens, chunk):
    return logps.token_scores(hidden, unembed, tokens, chunk=chunk).logps.sum()


def log_probabilities():
    rng = np.random.default_rng(0)
    arguments = (
        jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), jnp.float32),
        jnp.asarray(0.02 * rng.normal(size=(VOCAB, WIDTH)), jnp.float32),
        jnp.asarray(rng.integers(0, VOCAB, (ROWS, LENGTH))),
    )
    floor = 6 * ROWS * LENGTH * VOCAB * WIDTH / peak()
    versions = {"plain": plain} | {f"chunked/{n}": partial(chunked, chunk=n) for n in (8, 32, 128)}
    programs = {
        name: jax.jit(jax.value_and_grad(fn, (0, 1))).lower(*arguments).compile() for name, fn in versions.items()
    }
    seconds = {name: best(partial(program, *arguments)) for name, program in programs.items()}
    for name, program in programs.items():
        memory = program.memory_analysis().temp_size_in_bytes / 2**20
        report(
            f"logps/{name}", seconds[name], "s", floor,
            {"rows": ROWS, "length": LENGTH, "vocab": VOCAB, "width": WIDTH},
            temporary_mib=round(memory), vs_plain=round(seconds["plain"] / seconds[name], 2),
        )  # fmt: skip


def preference_losses():
    rate = bandwidth()
    rng = np.random.default_rng(0)
    for name, fn in sorted(inspect.getmembers(preference, inspect.isfunction)):
        parameters = inspect.signature(fn).parameters.values()
        names = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        if "chosen" not in names or not {"rejected", "ref_chosen", "ref_rejected"} >= set(names) - {"chosen"}:
            continue
        arguments = tuple(jnp.asarray(-rng.uniform(1, 9, PAIRS), jnp.float32) for _ in names)
        total = lambda *x, fn=fn: fn(*x).sum()
        program = jax.jit(jax.value_and_grad(total, tuple(range(len(names))))).lower(*arguments).compile()
        seconds = best(partial(program, *arguments))
        floor = 2 * sum(x.nbytes for x in arguments) / rate
        report(f"preference/{name}", 1e6 * seconds, "us", 1e6 * floor, {"pairs": PAIRS})


if __name__ == "__main__":
    log_probabilities()
    preference_losses()
