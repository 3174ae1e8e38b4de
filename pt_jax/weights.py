"""From a mask of scored tokens to the weights of a loss.

A loss is ``weighted_sum(per_token_loss, weights)``. Which mean is taken is decided here, once, over the whole
global batch; after that the losses, gradients and metrics of microbatches, devices and hosts just add up. The
functions differ only in how much a token weighs:

    ====================  ==========================================  ===================================
    function              weight of a scored token of row i           used by
    ====================  ==========================================  ===================================
    ``token_mean``        1 / (scored tokens of the batch)            SFT, DAPO
    ``sequence_mean``     1 / (scored tokens of row i) / (rows)       GRPO as published
    ``constant_length``   1 / length / (rows)                         Dr. GRPO
    ``row_mean``          1 / (rows); for one value a row, ``[B]``    DPO, reward models
    ====================  ==========================================  ===================================

"Rows" are the rows with at least one scored token, so that empty rows added to fill a batch change nothing.
"""

import jax.numpy as jnp

from pt_jax import checks


def token_mean(mask):
    """Every scored token of the batch weighs the same: w = mask / sum(mask).

    Yu et al. 2025 (DAPO), https://arxiv.org/abs/2503.14476, section 3.3.

    Args:
      mask: [B, T] bool, the tokens that are scored.

    Returns:
      [B, T] float32; sums to 1, or to 0 when nothing is scored.

    >>> print(token_mean(jnp.array([[True, True, False], [True, True, False]])))
    [[0.25 0.25 0.  ]
     [0.25 0.25 0.  ]]
    """
    checks.shapes(mask=(mask, "B T"))
    mask = jnp.asarray(mask, jnp.float32)
    return mask / jnp.maximum(mask.sum(), 1)


def sequence_mean(mask):
    """Mean over the scored tokens of a row, then over the rows that have any: w = mask / length_i / rows.

    Shao et al. 2024 (GRPO), https://arxiv.org/abs/2402.03300, equation 3: 1/G sum_i 1/|o_i| sum_t.

    Args:
      mask: [B, T] bool, the tokens that are scored.

    Returns:
      [B, T] float32; sums to 1, or to 0 when nothing is scored.

    >>> print(sequence_mean(jnp.array([[True, True, False], [True, False, False], [False, False, False]])))
    [[0.25 0.25 0.  ]
     [0.5  0.   0.  ]
     [0.   0.   0.  ]]
    """
    checks.shapes(mask=(mask, "B T"))
    mask = jnp.asarray(mask, jnp.float32)
    length = mask.sum(-1, keepdims=True)
    return mask / jnp.maximum(length, 1) / jnp.maximum((length > 0).sum(), 1)


def constant_length(mask, *, length):
    """Sum over a row divided by a fixed length, mean over rows: no token weighs less for its row being long.

    Liu et al. 2025 (Dr. GRPO), https://arxiv.org/abs/2503.20783, section 3.2.

    Args:
      mask: [B, T] bool, the tokens that are scored.
      length: > 0, usually the largest number of tokens that may be sampled.

    Returns:
      [B, T] float32.

    >>> print(constant_length(jnp.array([[True, True, False], [True, False, False]]), length=4))
    [[0.125 0.125 0.   ]
     [0.125 0.    0.   ]]
    """
    checks.shapes(mask=(mask, "B T"))
    checks.positive("length", length)
    mask = jnp.asarray(mask, jnp.float32)
    return mask / (length * jnp.maximum(mask.any(-1).sum(), 1))


def row_mean(rows):
    """Every real row weighs the same, for losses with one value a row: w = rows / sum(rows).

    Args:
      rows: [B] bool, False for a row that only fills the batch.

    Returns:
      [B] float32; sums to 1, or to 0 when there is no row.

    >>> print(row_mean(jnp.array([True, False, True, True])).round(3))
    [0.333 0.    0.333 0.333]
    """
    checks.shapes(rows=(rows, "B"))
    rows = jnp.asarray(rows, jnp.float32)
    return rows / jnp.maximum(rows.sum(), 1)


def weighted_sum(x, weights):
    """sum(w x) as a scalar, where an entry of weight 0 adds 0 whatever ``x`` holds there (NaN, 1e9).

    Args:
      x: values, for example a loss a token.
      weights: the same shape.

    Returns:
      A scalar, float32 or what is wider.

    >>> print(weighted_sum(jnp.array([[1.0, 3.0, jnp.nan]]), jnp.array([[0.5, 0.5, 0.0]])))
    2.0
    """
    if jnp.shape(x) != jnp.shape(weights):
        raise ValueError(f"weights has shape {jnp.shape(weights)}, expected that of x, {jnp.shape(x)}")
    x = jnp.where(weights != 0, x, 0)
    return jnp.sum(x.astype(jnp.promote_types(x.dtype, jnp.float32)) * weights)


def scored(mask, **arrays):
    """What every function of tokens does first: the arrays with 0 where nothing is scored, in float32 at least.

    Args:
      mask: [B, T] bool, the scored tokens.
      **arrays: argument name to array, each [B, T] and of a float type.

    Returns:
      The arrays in the order of the arguments, as ``zero_unscored`` gives them.

    Raises:
      ValueError: a shape disagrees, or an array is of whole numbers.

    >>> print(scored(jnp.array([[True, False]]), logps=jnp.array([[-2.0, jnp.nan]]))[0])
    [[-2. 0.]]
    """
    checks.shapes(**{name: (array, "B T") for name, array in arrays.items()}, mask=(mask, "B T"))
    return zero_unscored(mask, *checks.floats(**arrays))


def log_ratio(logps, other):
    """log p - log p_other, and 0 where both give the token probability 0: the one case in which a difference is NaN.

    Such tokens come up when an update moves a token out of the top k that it was sampled from, in both policies.

    >>> print(log_ratio(jnp.array([-1.0, -jnp.inf, -jnp.inf]), jnp.array([-2.0, -2.0, -jnp.inf])))
    [ 1. -inf 0.]
    """
    both = jnp.isneginf(logps) & jnp.isneginf(other)
    return jnp.where(both, 0, logps) - jnp.where(both, 0, other)


def times(weight, x):
    """weight x, and 0 where the weight is 0, whatever ``x`` is there: a weight of 0 takes an infinite loss out.

    >>> print(times(jnp.array([2.0, 0.0]), jnp.array([3.0, -jnp.inf])))
    [6. 0.]
    """
    return weight * jnp.where(weight == 0, 0, x)


def zero_unscored(mask, *arrays):
    """Each array with 0 where ``mask`` is False, so that no value and no gradient can come from there.

    Every function that works on tokens calls this first (law 4): a NaN that is only multiplied by a weight of 0
    later would still turn the gradient into NaN.

    >>> print(zero_unscored(jnp.array([True, False]), jnp.array([2.0, jnp.nan]))[0])
    [2. 0.]
    """
    return tuple(jnp.where(mask, x, 0) for x in arrays)
