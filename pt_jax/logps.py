"""From logits to log-probabilities and entropies of tokens, aligned with the tokens they speak of.

Everything a token is ``[B, T]``, and ``x[:, t]`` speaks of ``tokens[:, t]``. A model's row ``t`` of logits predicts
token ``t + 1``; the one place in the project that moves predictions onto their tokens is ``align``.
"""

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
    checks.shapes(logps=(logps, "B T"), mask=(mask, "B T"))
    return weights.zero_unscored(mask, logps)[0].sum(-1)
