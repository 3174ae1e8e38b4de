"""Ragged batches for tests of objectives: ratios in [0.1, 10], an empty row, rubbish in the masked slots."""

import jax
import numpy as np
from hypothesis import strategies as st

SHAPES = [(1, 1), (3, 5)]  # every shape is a compilation


def poisoned(mask, x, rubbish):
    return np.where(mask, x, rubbish).astype(np.float32)


@st.composite
def batches(draw, a_row=False):
    """``(logps, old_logps, advantages, mask)``, float32 and bool, all [B, T]; advantages equal over a row if asked."""
    rows, columns = draw(st.sampled_from(SHAPES))
    table = lambda x, width=columns: np.array(
        draw(st.lists(st.lists(x, min_size=width, max_size=width), min_size=rows, max_size=rows))
    )
    lengths = np.array(draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows)))
    lengths[1:2] = 0
    mask = np.arange(columns) < lengths[:, None]
    if columns > 2:
        mask[:, 1] &= draw(st.booleans())  # a hole: the answer of a tool
    old_logps = table(st.floats(-20, 0))
    logps = old_logps + np.log(table(st.floats(0.1, 10)))
    advantages = table(st.one_of(st.floats(-3, 3), st.sampled_from([0.0, 0.35])), 1 if a_row else columns)
    advantages = np.broadcast_to(advantages, mask.shape)
    return poisoned(mask, logps, np.nan), poisoned(mask, old_logps, 1e9), poisoned(mask, advantages, np.nan), mask


def rows_of(logps, old_logps, advantages, mask):
    """(row, columns, log-ratios, advantages) of every row with scored tokens, in float64."""
    for i in np.flatnonzero(mask.any(1)):
        t = np.flatnonzero(mask[i])
        yield i, t, logps[i, t].astype(np.float64) - old_logps[i, t], advantages[i, t].astype(np.float64)


def compiled(fn):
    """``batch -> (value, gradient of its sum in the first argument)``, compiled once a shape."""
    return jax.jit(lambda x, *rest, **k: (fn(x, *rest, **k), jax.grad(lambda y: fn(y, *rest, **k).sum())(x)))


MASK = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
RATIOS = np.array([[0.3, 3.0, 7.0, 1.1, 7.0], [9.0] * 5, [0.5, 0.9, 1.25, 2.0, 1.3]])
OLD_LOGPS = -np.linspace(0.1, 6, 15).reshape(3, 5)
ADVANTAGES = np.repeat([[0.7], [5.0], [-1.3]], 5, axis=1)
BATCH = (
    poisoned(MASK, OLD_LOGPS + np.log(RATIOS), np.nan),
    poisoned(MASK, OLD_LOGPS, 1e9),
    poisoned(MASK, ADVANTAGES, np.nan),
    MASK,
)


def together(ratio, advantage, columns=2):
    """A batch of one row whose tokens all have this ratio and this advantage."""
    x = np.full((1, columns), np.log(ratio), np.float32)
    return x, np.zeros_like(x), np.full_like(x, advantage), np.ones((1, columns), bool)


def far(gap, advantage):
    """The same with a log-ratio."""
    x = np.full((1, 2), gap, np.float32)
    return x, np.zeros_like(x), np.full_like(x, advantage), np.ones((1, 2), bool)
