"""What distribution tokens are sampled from: one description, used by the sampler and by every scorer.

An importance ratio is honest only when both sides speak of the same distribution. So the sampler draws from
``softmax(transform(logits, how))``, and a loss that scores what was drawn takes the log-probabilities of the same.
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Sampling:
    """How to turn logits into the distribution that is sampled from.

    A pytree: the numbers may be traced, so that another temperature does not compile anew. What is None is left out
    of the program altogether.

    Args:
      temperature: >= 0, divides the logits; 0 takes the likeliest token (the first of equals).
      top_k: >= 1, keeps the k likeliest tokens and those as likely as the k-th; or None.
      top_p: in (0, 1], keeps the smallest set of likeliest tokens that has this probability, at the temperature; or
        None. Holtzman et al. 2020, https://arxiv.org/abs/1904.09751.
      min_p: in [0, 1], keeps the tokens of at least this share of the likeliest one's probability; or None.
        Nguyen et al. 2024, https://arxiv.org/abs/2407.01082.
    """

    temperature: float | jax.Array = 1.0
    top_k: int | jax.Array | None = None
    top_p: float | jax.Array | None = None
    min_p: float | jax.Array | None = None

    def check(self):
        """Fails with a sentence when a number that is known is out of range; returns itself."""
        rules = {
            "temperature": (lambda x: x >= 0, "at least 0"),
            "top_k": (lambda x: x >= 1, "at least 1"),
            "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
            "min_p": (lambda x: 0 <= x <= 1, "from 0 to 1"),
        }
        for name, (good, expected) in rules.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, jax.core.Tracer) and not good(value):
                raise ValueError(f"{name} must be {expected}, got {value}")
        return self


GREEDY = Sampling(temperature=0.0)


def transform(logits, how: Sampling):
    """Logits of the distribution that is sampled from: scaled by the temperature, -inf for what cannot be drawn.

    top_k, top_p and min_p are each applied to the distribution that the temperature gives, and a token must pass all.

    Args:
      logits: [..., V], any float type.
      how: the description.

    Returns:
      [..., V] float32.

    Raises:
      ValueError: a number of ``how`` is out of range.

    >>> logits = jnp.log(jnp.array([4.0, 3.0, 2.0, 1.0]))
    >>> print(jax.nn.softmax(transform(logits, Sampling(top_k=2))).round(3))
    [0.571 0.429 0.    0.   ]
    >>> print(jax.nn.softmax(transform(logits, Sampling(temperature=0.5, top_p=0.9))).round(3))
    [0.552 0.31  0.138 0.   ]
    """
    how.check()
    logits = logits.astype(jnp.float32)
    likeliest = jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1], dtype=bool)
    cold = jnp.asarray(how.temperature) == 0
    scaled = logits / jnp.where(cold, 1.0, how.temperature)
    keep = likeliest | ~cold
    if how.top_k is not None or how.top_p is not None:
        order = jnp.sort(scaled, -1, descending=True)
        if how.top_k is not None:
            last = jnp.minimum(how.top_k, order.shape[-1]) - 1
            keep &= scaled >= jnp.take(order, last, axis=-1)[..., None]
        if how.top_p is not None:
            probabilities = jax.nn.softmax(order)
            before = jnp.cumsum(probabilities, -1) - probabilities
            # at 1 everything, though rounding can bring the sum to 1 before the last token
            needed = jnp.where((before < how.top_p) | (jnp.asarray(how.top_p) >= 1), order, jnp.inf)
            keep &= scaled >= jnp.min(needed, -1, keepdims=True)
    if how.min_p is not None:
        keep &= jax.nn.softmax(scaled) >= how.min_p * jnp.max(jax.nn.softmax(scaled), -1, keepdims=True)
    return jnp.where(keep | likeliest, scaled, -jnp.inf)


def draw(key, logits):
    """One token a row from softmax(logits), by inverting the cumulative distribution at one uniform number a row.

    Args:
      key: [B] PRNG keys, one a row.
      logits: [B, V] float32, -inf for what cannot be drawn.

    Returns:
      [B] int32.
    """
    uniform = jax.vmap(jax.random.uniform)(key)[:, None]
    probabilities = jax.nn.softmax(logits)
    cumulative = jnp.cumsum(probabilities, -1)
    possible = probabilities > 0
    # A parallel cumulative sum rounds every entry on its own, so it may rise where nothing was added, and the mark may
    # lie on or above the last entry: only a token that has some probability is taken, and failing all, the last such.
    passes = possible & (cumulative > uniform * cumulative[:, -1:])
    last = logits.shape[-1] - 1 - jnp.argmax(possible[:, ::-1], -1)
    return jnp.where(passes.any(-1), jnp.argmax(passes, -1), last).astype(jnp.int32)
