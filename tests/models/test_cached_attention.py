"""Attention to the parts of a cache, in 16 bits."""

import jax.numpy as jnp
import numpy as np

from pt_jax.models import attention


def test_a_flat_look_at_a_long_prompt_stays_finite_in_16_bits():
    """A sum of values that are not divided yet would be infinite in float16: 700 times 300. And scores of 160,000."""
    rng = np.random.default_rng(0)
    visible = [np.ones((2, 1, 1, 700), bool), np.arange(5)[None, None, None] < np.array([3, 5])[:, None, None, None]]
    for dtype, close in ((jnp.float16, 2e-3), (jnp.bfloat16, 2e-2)):
        for size in (0.0, 200.0):  # of queries and keys
            q = jnp.full((2, 1, 2, 4), size, dtype)
            parts = [
                {"k": jnp.full((rows, 1, 4, S), size, dtype),
                 "v": jnp.asarray(rng.uniform(250, 350, (rows, 1, S, 4)), dtype)}
                for rows, S in ((1, 700), (2, 5))
            ]  # fmt: skip
            got = attention.of_cache("plain", visible, scale=1.0)(q, parts)
            values = [np.asarray(x["v"], np.float64)[:, 0] for x in parts]
            for row, n in enumerate((3, 5)):
                expected = np.concatenate([values[0][0], values[1][row, :n]]).mean(0)
                np.testing.assert_allclose(got[row, 0], np.stack([expected] * 2), rtol=close)
            assert got.dtype == dtype
