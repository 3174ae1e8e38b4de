"""Weights, texts and programs for tests of tiny decoders."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pt_jax.models import parameters

VOCAB = 29
LENGTHS = (12, 7, 1, 4)
T = max(LENGTHS)

# One program a config and shape, for all tests. They compile longer than they run: half as long like this.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def weights(config, seed=0, scale=0.25):
    """Far from the initial ones: with norms of 1 and deviations of 0.02 most mistakes stay below any tolerance."""
    rng = np.random.default_rng(seed)

    def fresh(path, x):
        noise = rng.normal(size=x.shape)
        return jnp.asarray(1 + 0.3 * noise if path[-1].key.endswith("norm") else scale * noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(fresh, jax.eval_shape(lambda: parameters.init(config, jax.random.key(0))))


def rows(seed=1):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in LENGTHS]


def padded(rows, before, fill=0):
    """Every row with ``before`` of its padding on the left, the rest on the right: tokens, seen, first columns."""
    tokens, seen = np.full((len(rows), T), fill, np.int32), np.zeros((len(rows), T), bool)
    starts = [before(T - len(row)) for row in rows]
    for i, (row, start) in enumerate(zip(rows, starts)):
        tokens[i, start : start + len(row)], seen[i, start : start + len(row)] = row, True
    return tokens, seen, starts


def equations(jaxpr):
    """Every equation, those of inner programs too."""
    for e in jaxpr.eqns:
        yield e
        for inner in jax.tree.leaves(list(e.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
