"""From logits to log-probabilities and entropies of tokens, aligned with the tokens they speak of.

Everything a token is ``[B, T]``, and ``x[:, t]`` speaks of ``tokens[:, t]``. A model's row ``t`` of logits predicts
token ``t + 1``; the one place in the project that moves predictions onto their tokens is ``align``.

A vocabulary of 150,000 makes the logits the largest array of a training step by far. ``token_scores`` starts one step
earlier, at the hidden states, and never has more than a few columns of logits at a time, forwards or backwards.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from pt_jax import checks, weights


def align(predictions):
    """Moves what rows 0 to T - 2 predict onto the tokens that they speak of, 1 to T - 1.

        out[b, t] = predictions[b, t - 1],   out[b, 0] = 0

    The only shift in the project (law 1): everything that is computed from logits goes through it once. The last
    row of logits predicts a token that is not there: leave it out before, so that nothing comes from it.

    Args:
      predictions: [B, T - 1, ...], computed from ``logits[:, :-1]``.

    Returns:
      [B, T, ...] with 0 for the first token, which nothing predicts.

    >>> print(align(jnp.array([[1.0, 2.0, 3.0]])))
    [[0. 1. 2. 3.]]
    """
    return jnp.pad(predictions, [(0, 0), (1, 0), *[(0, 0)] * (predictions.ndim - 2)])


def token_logps(logits, tokens):
    """Log-probability of each token given those before it.

        logps[b, t] = log softmax(logits[b, t - 1])[tokens[b, t]],   logps[b, 0] = 0

    Args:
      logits: [B, T, V], any float type; row t scores token t + 1. Divide by the temperature beforehand
        (``sampling.transform`` does, for every way of sampling).
      tokens: [B, T] int, each in [0, V).

    Returns:
      [B, T] float32, in nats.

    Raises:
      ValueError: the shapes disagree.

    >>> two_to_one = jnp.log(jnp.array([[[2.0, 1.0], [1.0, 1.0]]]))
    >>> print(jnp.exp(token_logps(two_to_one, jnp.array([[1, 0]]))).round(3))
    [[1.    0.667]]
    """
    checks.shapes(logits=(logits, "B T V"), tokens=(tokens, "B T"))
    (logits,) = checks.floats(logits=logits)
    return align(-optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]))


def token_entropies(logits):
    """Entropy of the distribution that each token was drawn from.

        H[b, t] = -sum_v p_v log p_v,   p = softmax(logits[b, t - 1]),   H[b, 0] = 0

    Args:
      logits: [B, T, V], any float type; a logit of -inf is a token that cannot be drawn.

    Returns:
      [B, T] float32, in nats; log V for uniform logits.

    >>> print(token_entropies(jnp.zeros((1, 2, 4))).round(4))  # log 4
    [[0.     1.3863]]
    """
    checks.shapes(logits=(logits, "B T V"))
    (logits,) = checks.floats(logits=logits)
    logps = jax.nn.log_softmax(logits[:, :-1])
    # 0 log 0 is 0: a forbidden token adds exp(-inf) * 0, and its gradient is 0 as well
    return align(-jnp.sum(jnp.exp(logps) * jnp.where(jnp.isneginf(logps), 0.0, logps), -1))


def top_1_hits(logits, tokens):
    """Whether each token is the likeliest one given those before it.

    Args:
      logits: [B, T, V].
      tokens: [B, T] int.

    Returns:
      [B, T] float32 of 0 and 1; 0 for the first token.

    >>> print(top_1_hits(jnp.array([[[2.0, 1.0], [2.0, 1.0], [0.0, 0.0]]]), jnp.array([[0, 0, 1]])))
    [[0. 1. 0.]]
    """
    checks.shapes(logits=(logits, "B T V"), tokens=(tokens, "B T"))
    checks.floats(logits=logits)
    return align((jnp.argmax(logits[:, :-1], -1) == tokens[:, 1:]).astype(jnp.float32))


def sequence_logps(logps, mask):
    """Log-probability of a row's scored tokens together: sum_t logps over the mask.

    Args:
      logps: [B, T] in nats, from ``token_logps``.
      mask: [B, T] bool, the scored tokens.

    Returns:
      [B] float32, in nats; 0 for a row without scored tokens.

    >>> print(sequence_logps(jnp.array([[-1.0, -2.0, jnp.nan]]), jnp.array([[True, True, False]])))
    [-3.]
    """
    (logps,) = weights.scored(mask, logps=logps)  # in float32: 2000 tokens added up in bfloat16 lose whole nats
    return logps.sum(-1)


class TokenScores(NamedTuple):
    """What the distribution over the vocabulary says about each token; all [B, T] float32, 0 for the first token.

    Args:
      logps: log-probability of the token, in nats; as ``token_logps``.
      entropies: of the distribution that it comes from, in nats; as ``token_entropies``.
      log_collisions: log sum_v p_v^2, in nats: the log-probability of the token that the model itself would expect to
        draw, with which WPO compares ``logps``.
      mean_logits: mean over the vocabulary of the logits.
      hits: 1 where the token is the likeliest; as ``top_1_hits``.
    """

    logps: jax.Array
    entropies: jax.Array
    log_collisions: jax.Array
    mean_logits: jax.Array
    hits: jax.Array


def token_scores(hidden, unembed, tokens, *, temperature=1.0, softcap=None, scale=1.0, chunk=32) -> TokenScores:
    """Log-probabilities and their company from hidden states, without ever forming the logits [B, T, V].

        z = scale * hidden @ unembed.T;   z = softcap tanh(z / softcap), if there is one;   z = z / temperature
        logps[b, t] = log softmax(z[b, t - 1])[tokens[b, t]],   and the others likewise

    The columns are scored a chunk at a time, and once more for the gradient: a third more products with the
    unembedding, for B * chunk rows of logits in memory instead of B * T. An unembedding that is not in float32 already
    is copied into it. What is not used costs nothing under jit.

    Args:
      hidden: [B, T, D] the last hidden states, after the final norm; row t scores token t + 1.
      unembed: [V, D]; products are taken in the type of ``hidden``, sums and gradients in float32.
      tokens: [B, T] int, each in [0, V).
      temperature: > 0.
      softcap: > 0, bounds the logits (Gemma 2, https://arxiv.org/abs/2408.00118, section 2); or None.
      scale: of the logits (Cohere, Granite).
      chunk: columns at a time.

    Returns:
      ``TokenScores``.

    Raises:
      ValueError: the shapes disagree, or a number is out of range.

    >>> unembed = jnp.log(jnp.array([[2.0], [1.0]]))
    >>> scores = token_scores(jnp.ones((1, 2, 1)), unembed, jnp.array([[1, 0]]))
    >>> print(jnp.exp(scores.logps).round(3))
    [[1.    0.667]]
    """
    checks.shapes(hidden=(hidden, "B T D"), unembed=(unembed, "V D"), tokens=(tokens, "B T"))
    checks.floats(hidden=hidden, unembed=unembed)
    numbers = {"temperature": temperature, "scale": scale, "chunk": chunk} | (
        {} if softcap is None else {"softcap": softcap}
    )
    for name, number in numbers.items():
        checks.positive(name, number)
    wide = jnp.promote_types(jnp.promote_types(hidden.dtype, unembed.dtype), jnp.float32)
    unembed = unembed.astype(wide)  # the type in which its gradient is summed over the chunks

    def score(hidden, tokens):
        # rows and columns as one axis: a plain matrix product, which the CPU does twice as fast in a loop
        rows = hidden.reshape(-1, hidden.shape[-1])
        z = jnp.einsum("nd,vd->nv", rows, unembed.astype(rows.dtype), preferred_element_type=wide)
        z = scale * z.reshape(*tokens.shape, -1)
        z = z if softcap is None else softcap * jnp.tanh(z / softcap)
        z = z / temperature
        logps = jax.nn.log_softmax(z)
        return TokenScores(
            jnp.take_along_axis(logps, tokens[..., None], -1)[..., 0],
            -jnp.sum(jnp.exp(logps) * logps, -1),
            jax.nn.logsumexp(2 * logps, -1),
            z.mean(-1),
            (jnp.argmax(z, -1) == tokens).astype(wide),
        )

    return jax.tree.map(align, over_columns(score, hidden[:, :-1], tokens[:, 1:], chunk=chunk))


def over_columns(fn, *arrays, chunk):
    """``fn`` on a few columns at a time, keeping nothing for its gradient but what went in.

    For a function whose inside is much larger than its arguments and results, such as anything that goes through
    logits. It is computed a second time when differentiated.

    Args:
      fn: arrays [B, chunk, ...] -> a tree of arrays [B, chunk, ...], each column on its own.
      *arrays: [B, T, ...].
      chunk: columns at a time; the last chunk is filled up with zeros.

    Returns:
      The tree with [B, T, ...].

    >>> print(over_columns(lambda x: 2 * x, jnp.array([[1.0, 2.0, 3.0]]), chunk=2))
    [[2. 4. 6.]]
    """
    rows, length = arrays[0].shape[:2]
    chunk = max(1, min(chunk, length))
    parts = -(-length // chunk)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, parts * chunk - length), *[(0, 0)] * (x.ndim - 2)])
        return x.reshape(rows, parts, chunk, *x.shape[2:]).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(rows, parts * chunk, *x.shape[3:])[:, :length]

    # prevent_cse keeps XLA from undoing the recomputation; a loop keeps it from doing so anyway
    by_chunk = jax.checkpoint(lambda part: fn(*part), prevent_cse=False)
    return jax.tree.map(join, jax.lax.map(by_chunk, tuple(split(x) for x in arrays)))
