"""What do weights in 8 and 4 bits cost, and what do they save?

    python benchmarks/quantize.py

JSON lines, against the same weights in float32 in the same run: a product of a few rows (a step of decoding) and of
many (a step of training) with a 2048 x 2048 matrix, and the forward pass through eight such matrices that are scanned,
as a model scans its layers. Milliseconds; the floor is to read what is kept once at the machine's bandwidth, or the
operations at the rate of a large product, whichever is longer; what fits a cache is read faster than that. ``bits`` a
weight; ``error`` is the root mean square of the difference over that of the weights, which are normal.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from common import bandwidth, best, peak, report

from pt_jax.models import linear, quantize

WIDTH, LAYERS = 2048, 8
HOWS = {"float32": None, "int8": quantize.int8, "nf4": quantize.nf4, "nf4_double": quantize.nf4_double}


def product(x, w):
    return linear.einsum("btd,df->btf", x, w)


def stack(x, w):
    return jax.lax.scan(lambda x, w: (product(x, w), None), x, w)[0]


def kept(w, how):
    return w if how is None else quantize.quantize({"layers": {"up": w}}, how)["layers"]["up"]


def main():
    rng, rate, speed = np.random.default_rng(0), bandwidth(), peak()
    weights = jnp.asarray(rng.normal(size=(LAYERS, WIDTH, WIDTH)) / WIDTH**0.5, jnp.float32)
    for name, fn, w in (("product", product, weights[0]), ("stack", stack, weights)):
        for rows in (1, 16, 256):
            x = jnp.asarray(rng.normal(size=(1, rows, WIDTH)), jnp.float32)
            plain = None
            for form, how in HOWS.items():
                held = jax.tree.map(lambda a: a[0], kept(w[None], how)) if w.ndim == 2 else kept(w, how)
                bytes_held = sum(a.nbytes for a in jax.tree.leaves(held))
                program = jax.jit(fn).lower(x, held).compile()
                seconds = best(partial(program, x, held), 9)
                plain = seconds if plain is None else plain
                error = linear.dense(held, jnp.float32) - w
                report(
                    f"{name}/{form}", 1e3 * seconds, "ms", 1e3 * max(bytes_held / rate, 2 * rows * w.size / speed),
                    {"width": WIDTH, "layers": w.size // WIDTH**2, "rows": rows},
                    vs_float32=round(plain / seconds, 2), bits=round(8 * bytes_held / w.size, 3),
                    error=round(float(jnp.linalg.norm(error) / jnp.linalg.norm(w)), 5),
                    temporary_mib=round(program.memory_analysis().temp_size_in_bytes / 2**20, 1),
                )  # fmt: skip


if __name__ == "__main__":
    main()
