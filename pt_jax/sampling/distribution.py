"""What distribution tokens are sampled from: one description, used by the sampler and by every scorer.

An importance ratio is honest only when both sides speak of the same distribution. So the sampler draws from
``softmax(transform(logits, how))``, and a loss that scores what was drawn takes the log-probabilities of the same:
``scored_logits`` tells ``transform`` what came before each token of a whole row.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from pt_jax import checks
from pt_jax.sampling import penalties


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
      allowed: [V] bool, the tokens that may be drawn at all; or None.
      min_length: tokens that are drawn before one of ``end_tokens`` may be; or None.
      end_tokens: ids, for ``min_length``.
      repetition_penalty: above 0, weakens the tokens of prompt and completion, ``penalties.repetition``; or None.
      frequency_penalty: taken off for each time that a token is in the completion, ``penalties.frequency``; or None.
      presence_penalty: taken off for the tokens of the completion, however often, ``penalties.presence``; or None.
    """

    temperature: float | jax.Array = 1.0
    top_k: int | jax.Array | None = None
    top_p: float | jax.Array | None = None
    min_p: float | jax.Array | None = None
    allowed: jax.Array | None = None
    min_length: int | jax.Array | None = None
    end_tokens: tuple[int, ...] | jax.Array | None = None
    repetition_penalty: float | jax.Array | None = None
    frequency_penalty: float | jax.Array | None = None
    presence_penalty: float | jax.Array | None = None

    def check(self):
        """Fails with a sentence when a number that is known is out of range; returns itself."""
        rules = {
            "temperature": (lambda x: (x >= 0) & (x < np.inf), "at least 0 and finite"),
            "top_k": (lambda x: x >= 1, "at least 1"),
            "top_p": (lambda x: (x > 0) & (x <= 1), "above 0 and at most 1"),
            "min_p": (lambda x: (x >= 0) & (x <= 1), "from 0 to 1"),
            "min_length": (lambda x: x >= 0, "at least 0"),
            "repetition_penalty": (lambda x: (x > 0) & (x < np.inf), "above 0 and finite"),
            "frequency_penalty": (np.isfinite, "finite"),
            "presence_penalty": (np.isfinite, "finite"),
        }
        for name, (good, expected) in rules.items():
            value = getattr(self, name)
            if (value is None and name != "temperature") or isinstance(value, jax.core.Tracer):
                continue
            known = np.asarray(value)
            if not (jnp.issubdtype(known.dtype, np.number) and np.all(good(known))):
                raise ValueError(f"{name} must be {expected}, got {value}")
        if (self.min_length is None) != (self.end_tokens is None):
            raise ValueError("min_length holds end_tokens back: give both, or neither")
        ends = [x if hasattr(x, "dtype") else np.asarray(x) for x in jax.tree.leaves(self.end_tokens)]
        if not all(jnp.issubdtype(x.dtype, np.integer) for x in ends):
            raise ValueError(f"Sampling's end_tokens must be ids in a tuple, such as (2,), got {self.end_tokens!r}")
        kind = getattr(self.allowed, "dtype", object)
        if self.allowed is not None and (np.ndim(self.allowed) != 1 or not jnp.issubdtype(kind, np.bool_)):
            raise ValueError(f"allowed must be [V] bool, True for the tokens that may be drawn, got {self.allowed}")
        if self.allowed is not None and not isinstance(self.allowed, jax.core.Tracer) and not np.any(self.allowed):
            raise ValueError("allowed forbids every token")
        return self

    def of_rows(self, rows: int, axes: int = 1):
        """The same with a number a row as [B, 1], beside logits [B, V]; or with more ``axes`` behind B.

        >>> Sampling(temperature=jnp.array([0.5, 1.0])).of_rows(2).temperature.shape
        (2, 1)
        """
        numbers = {name: getattr(self, name) for name in NUMBERS}
        for name, x in numbers.items():
            if x is not None and np.shape(x) not in ((), (rows,)):
                raise ValueError(f"{name} has shape {np.shape(x)}; give one number, or one for each of {rows} rows")
        return self.replace(
            **{
                name: jnp.reshape(jnp.asarray(x), (rows, *(1,) * axes))
                for name, x in numbers.items()
                if x is not None and np.ndim(x)
            }
        )


GREEDY = Sampling(temperature=0.0)
NUMBERS = (
    "temperature", "top_k", "top_p", "min_p", "min_length", "repetition_penalty", "frequency_penalty",
    "presence_penalty",
)  # fmt: skip


def transform(logits, how: Sampling, index=None, history=None, drawn=None):
    """Logits of the distribution that is sampled from: scaled by the temperature, -inf for what cannot be drawn.

    Penalties come first, then what is forbidden, then the temperature. top_k, top_p and min_p are each applied to the
    distribution that the temperature gives over the tokens that are allowed, and a token must pass all.

    Args:
      logits: [..., V], any float type.
      how: the description.
      index: how many tokens of the completion were drawn before, [...] or a scalar; ``min_length`` looks at it.
      history: ``penalties.History`` of [..., V], what came before; the penalties look at it.
      drawn: [...] int32, a token that top_k, top_p and min_p leave in, whatever its logit; -1: none.

    Returns:
      [..., V] float32.

    Raises:
      ValueError: a number of ``how`` is out of range, ``min_length`` is not told the index, or a penalty the history.

    >>> logits = jnp.log(jnp.array([4.0, 3.0, 2.0, 1.0]))
    >>> print(jax.nn.softmax(transform(logits, Sampling(top_k=2))).round(3))
    [0.571 0.429 0.    0.   ]
    >>> print(jax.nn.softmax(transform(logits, Sampling(temperature=0.5, top_p=0.9))).round(3))
    [0.552 0.31  0.138 0.   ]
    """
    how.check()
    logits = penalties.penalised(logits.astype(jnp.float32), how, history)
    logits = _without_forbidden(logits, how, index)
    likeliest = _columns(logits) == _first(logits == logits.max(-1, keepdims=True))
    cold = jnp.asarray(how.temperature) == 0
    scaled = logits / jnp.where(cold, 1.0, how.temperature)
    keep = (likeliest | ~cold) & ~jnp.isneginf(logits)
    if how.top_k is not None:
        keep &= scaled >= _largest_with(lambda kept: kept.sum(-1, keepdims=True) >= how.top_k, scaled)
    if how.top_p is not None:
        p = jax.nn.softmax(jax.lax.stop_gradient(scaled))
        mass = lambda kept: jnp.where(kept, p, 0).sum(-1, keepdims=True)
        # at 1 everything, though rounding can bring the sum to 1 before the last token
        keep &= (scaled >= _largest_with(lambda kept: mass(kept) >= how.top_p, scaled)) | (jnp.asarray(how.top_p) >= 1)
    if how.min_p is not None:
        keep &= jax.nn.softmax(scaled) >= how.min_p * jnp.max(jax.nn.softmax(scaled), -1, keepdims=True)
    if drawn is not None:
        keep |= (_columns(logits) == jnp.expand_dims(drawn, -1)) & ~jnp.isneginf(logits)
    return jnp.where(keep | likeliest, scaled, -jnp.inf)


def scored_logits(logits, tokens, seen, mask, how: Sampling):
    """Logits of the distributions that the tokens of whole rows were sampled from, for those who score them.

        out[b, t] = transform(logits[b, t], how, index, history of tokens[b, :t + 1])

    What the sampler knows when it draws a token is worked out from the row: which tokens are there, how often each was
    drawn, and how many were drawn. It costs nothing when ``how`` does not ask.

    A token that was sampled could be drawn, so top_k, top_p and min_p leave it in. By these logits alone it might not:
    in 16 bits those of sampler and trainer differ by rounding, and after an update they are of another policy.

    Args:
      logits: [B, T, V], row t predicts token t + 1.
      tokens: [B, T] int32, prompt and completion.
      seen: [B, T] bool, False for padding.
      mask: [B, T] bool, the tokens that were sampled; None will do where ``how`` does not ask what came before.
      how: the description; its numbers may be [B], one a row.

    Returns:
      [B, T, V] float32, for ``logps.token_logps``.

    Raises:
      ValueError: as ``transform``; or ``how`` asks what came before, and there is no mask or a row holds several texts.

    >>> how = Sampling(presence_penalty=1.0)
    >>> tokens, seen = jnp.array([[1, 0, 0]]), jnp.ones((1, 3), bool)
    >>> print(scored_logits(jnp.zeros((1, 3, 2)), tokens, seen, jnp.array([[False, True, True]]), how)[0])
    [[ 0.  0.]
     [-1.  0.]
     [-1.  0.]]
    """
    checks.shapes(logits=(logits, "B T V"), tokens=(tokens, "B T"))
    how = how.of_rows(len(tokens), axes=2)
    cuts = any(x is not None for x in (how.top_k, how.top_p, how.min_p))
    drawn = _next_drawn(jnp.asarray(tokens), mask) if cuts and mask is not None else None
    if how.min_length is None and not penalties.asks(how):
        return transform(logits, how, drawn=drawn)
    if mask is None:
        raise ValueError("min_length and penalties depend on which tokens were sampled; give the mask [B, T]")
    checks.shapes(tokens=(tokens, "B T"), seen=(seen, "B T"), mask=(mask, "B T"))
    if jnp.result_type(seen) != jnp.bool_:
        raise ValueError("seen must be bool here: min_length and penalties do not know rows of several texts")
    seen, mask = jnp.asarray(seen), jnp.asarray(mask, bool)
    nothing = penalties.empty(how, len(tokens), logits.shape[-1])
    history = penalties.of_columns(nothing, jnp.asarray(tokens), seen, mask)
    return transform(logits, how, jnp.cumsum(mask, 1), history, drawn)


def _next_drawn(tokens, mask):
    """Of every column, the token that comes next if it was sampled; else -1."""
    return jnp.pad(jnp.where(jnp.asarray(mask, bool), tokens, -1)[:, 1:], ((0, 0), (0, 1)), constant_values=-1)


def _without_forbidden(logits, how, index):
    if how.allowed is not None:
        if jnp.shape(how.allowed) != logits.shape[-1:]:
            raise ValueError(f"allowed has shape {jnp.shape(how.allowed)}, expected [{logits.shape[-1]}], one a token")
        logits = jnp.where(_over(how.allowed, logits), logits, -jnp.inf)
    if how.min_length is None:
        return logits
    if index is None:
        raise ValueError("min_length depends on how many tokens were drawn before; give transform the index")
    ends = jnp.asarray(how.end_tokens, jnp.int32)  # a negative one never comes, and is not the last of the vocabulary
    ends = jnp.zeros(logits.shape[-1], bool).at[jnp.where(ends < 0, logits.shape[-1], ends)].set(True, mode="drop")
    index = jnp.reshape(index, (*jnp.shape(index), *(1,) * (logits.ndim - jnp.ndim(index))))
    return jnp.where((index < how.min_length) & _over(ends, logits), -jnp.inf, logits)


def _over(of_tokens, logits):
    """[V] spelt out over [..., V] for jax_numpy_rank_promotion="raise"."""
    return jnp.reshape(of_tokens, (1,) * (logits.ndim - 1) + (-1,))


def _largest_with(enough, x):
    """The largest mark such that ``enough`` is true of what is at or above it, in each row; -inf where there is none.

    Found bit by bit, without sorting: a vocabulary is sorted in a hundred times the time in which it is summed up.

    Args:
      enough: mask [..., V] -> [..., 1] bool; what is true of a mask is true of all that contain it.
      x: [..., V] float32.
    """
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(x), jnp.int32)
    order = jnp.where(bits < 0, jnp.iinfo(jnp.int32).min - bits, bits)  # whole numbers in the order of the floats

    def halve(_, bounds):
        low, high = bounds  # enough at low, not at high
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        at = enough(order >= middle)
        return jnp.where(at, middle, low), jnp.where(at, high, middle)

    low, high = (jnp.full_like(order[..., :1], jnp.iinfo(jnp.int32).min), order.max(-1, keepdims=True) + 1)
    low, _ = jax.lax.fori_loop(0, 32, halve, (low, high))
    return jnp.where(order >= low, x, jnp.inf).min(-1, keepdims=True)


def draw(key, logits):
    """One token a row from softmax(logits), by inverting the cumulative distribution at one uniform number a row.

    The vocabulary is cut into blocks: the one in which the number falls is found first, and then the token in it. The
    cumulative sum of a whole vocabulary, and ``argmax``, take a CPU ten times as long as all of this.

    Args:
      key: [B] PRNG keys, one a row.
      logits: [B, V] float32, -inf for what cannot be drawn.

    Returns:
      [B] int32.
    """
    B, V = logits.shape
    size = math.isqrt(V - 1) + 1
    uniform = jax.vmap(jax.random.uniform)(key)[:, None]
    shares = jnp.exp(logits - logits.max(-1, keepdims=True))
    blocks = jnp.pad(shares, ((0, 0), (0, -V % size))).reshape(B, -1, size)
    sums = blocks.sum(-1)
    upto = jnp.cumsum(sums, -1)
    mark = uniform * upto[:, -1:]
    block = _where_it_passes(sums, upto, mark)
    before = jnp.take_along_axis(upto - sums, block, 1)
    inside = jnp.take_along_axis(blocks, block[:, :, None], 1)[:, 0]
    return (block * size + _where_it_passes(inside, jnp.cumsum(inside, -1), mark - before))[:, 0]


def _where_it_passes(shares, cumulative, mark):
    """The first of some shares [B, N] at which their cumulative sum is above the mark [B, 1]: [B, 1] int32.

    A cumulative sum rounds every entry on its own, so it may rise where nothing was added, and the mark may lie on or
    above the last entry: only what has some share is taken, and failing all, the last such.
    """
    some = shares > 0
    first = _first(some & (cumulative > mark))
    return jnp.where(first < shares.shape[-1], first, jnp.where(some, _columns(shares), 0).max(-1, keepdims=True))


def _first(mask):
    """The first column [..., 1] at which a mask [..., N] is true; N where there is none."""
    return jnp.where(mask, _columns(mask), mask.shape[-1]).min(-1, keepdims=True)


def _columns(x):
    """0 to N - 1, spelt out over x [..., N]."""
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
