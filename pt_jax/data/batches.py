"""Which rows make up a step's batch, and how rows of different lengths become one array.

A data set with a seeded order has the step number as its whole state: a run that resumes at step n asks for the rows
of step n, and there is nothing else to restore.
"""

import numpy as np


def rows_of_step(count: int, batch: int, step: int, *, seed: int) -> np.ndarray:
    """The rows of one step: [batch] int, in an order that is shuffled anew each epoch.

    Every row comes once an epoch; a batch may end one epoch and begin the next, so no row is left over.

    Args:
      count: rows of the data set.
      batch: rows a step.
      step: from 0.
      seed: of the order.

    >>> [rows_of_step(4, 3, step, seed=0).tolist() for step in range(4)]  # three epochs of four rows
    [[2, 0, 1], [3, 3, 0], [2, 1, 2], [1, 0, 3]]
    """
    if count < 1 or batch < 1:
        raise ValueError(f"a batch of {batch} rows cannot be taken from {count}")
    position = np.arange(step * batch, (step + 1) * batch)
    orders = {e: np.random.default_rng([seed, e]).permutation(count) for e in set((position // count).tolist())}
    return np.array([orders[p // count][p % count] for p in position.tolist()])


def bucket(length: int) -> int:
    """The padded length for a row: few different ones, so that a jitted function is traced once for each.

    Multiples of 8 to 64, then four steps to each doubling: at most a fifth of a long row is padding.

    >>> [bucket(n) for n in (3, 8, 50, 65, 100, 129, 1000)]
    [8, 8, 56, 80, 112, 160, 1024]
    """
    step = 8 if length <= 64 else 2 ** ((length - 1).bit_length() - 3)
    return -(-length // step) * step


def pad(rows, length: int, fill, *, left: bool = False) -> np.ndarray:
    """Rows of different lengths as one array, filled up on the right, or on the left for prompts.

    Args:
      rows: 1-d arrays of one dtype.
      length: of the result; no row is longer.
      fill: what stands in the padding.
      left: which side is filled.

    >>> pad([np.array([5, 6]), np.array([7])], 3, 0, left=True).tolist()
    [[0, 5, 6], [0, 0, 7]]
    """
    out = np.full((len(rows), length), fill, np.asarray(rows[0]).dtype)
    for i, row in enumerate(rows):
        if len(row) > length:
            raise ValueError(f"row {i} has {len(row)} tokens, more than the length of {length}")
        out[i, slice(length - len(row), None) if left else slice(len(row))] = row
    return out
