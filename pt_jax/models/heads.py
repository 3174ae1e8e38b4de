"""Models that give numbers instead of tokens: reward models, and the critics of PPO.

Such a model is a decoder with a row of weights in the place of its unembedding (``Config.head`` is "score"):

    score[b, t] = w . x[b, t],   x the last hidden states, normed

A reward model reads its score behind the last token of a text; a critic's value of a token is the score in front of it.
On disk it is what transformers calls a sequence classifier with one label.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from pt_jax.models import decoder, linear, visibility
from pt_jax.models.config import DEFAULT, Config


def from_language_model(params, config: Config, key=None):
    """A language model with a fresh head in the place of its unembedding; the trunk's arrays are shared.

        w ~ Normal(0, 1 / (d + 1)),   or 0 without a key

    The deviation 1 / sqrt(d + 1) is that of the code of Stiennon et al. 2020, https://arxiv.org/abs/2009.01325, as
    Huang et al. 2024, https://arxiv.org/abs/2403.17031, found. With 0 every text is worth 0 until the first step.

    Args:
      params: of a language model.
      config: its config.
      key: PRNG key, or None.

    Returns:
      params, config. The head has the type of the last norm.

    Raises:
      ValueError: the model has such a head already.

    >>> config = Config(vocab=8, layers=1, width=4, heads=1, kv_heads=1, head_width=4, hidden=4, tied=False)
    >>> params = {"embed": jnp.ones((8, 4)), "unembed": jnp.ones((8, 4)), "norm": jnp.ones(4), "layers": {}}
    >>> params, config = from_language_model(params, config)
    >>> sorted(params), config.head, params["score"].shape
    (['embed', 'layers', 'norm', 'score'], 'score', (4,))
    """
    if config.head != "tokens":
        raise ValueError("config.head is 'score': this model has a head already; give a language model")
    w = (
        jnp.zeros(config.width)
        if key is None
        else jax.random.normal(key, (config.width,)) / math.sqrt(config.width + 1)
    )
    trunk = {name: leaf for name, leaf in params.items() if name != "unembed"}
    return trunk | {"score": w.astype(params["norm"].dtype)}, dataclasses.replace(config, head="score")


def scores(config: Config, params, tokens, seen, *, how=DEFAULT):
    """What the head says at every token, having read it.

    Args:
      config: of a model with ``head="score"``.
      params: its tree.
      tokens: [B, T] int32.
      seen: which tokens are there, and of which text: one of the forms of ``visibility``.
      how: see ``Execution``.

    Returns:
      [B, T] float32; 0 for padding. The product with the head is float32 whatever the model computes in.

    Raises:
      ValueError: the model is a language model, or the shapes disagree.
    """
    if config.head != "score":
        raise ValueError("config.head is 'tokens': this model has no score; use heads.from_language_model")
    x, _ = decoder.hidden(config, params, tokens, seen, how=how)
    out = linear.einsum("btd,d->bt", x.astype(jnp.float32), params["score"])
    return jnp.where(_there(seen), out, 0)


def rewards(config: Config, params, tokens, seen, *, how=DEFAULT):
    """What a reward model gives each text: the score at its last token.

        reward[b] = score[b, max{t: seen[b, t]}]

    transformers takes the last token that is not the pad token, so where a text ends in it, because it is the end
    token too, transformers reads the score one token earlier. Here ``seen`` says where a text ends.

    Args:
      config, params, tokens, how: as ``scores``.
      seen: [B, T] bool, False for padding on either side. For rows of several texts take ``scores`` at their ends.

    Returns:
      [B] float32; 0 for a row that has no token.

    Raises:
      ValueError: the model is a language model, the shapes disagree, or rows hold several texts.
    """
    if seen.dtype != bool:
        raise ValueError("seen numbers the texts of packed rows; give bool, one text a row, or take heads.scores")
    of_tokens = scores(config, params, tokens, seen, how=how)
    last = seen.shape[1] - 1 - jnp.argmax(seen[:, ::-1], 1)
    return jnp.take_along_axis(of_tokens, last[:, None], 1)[:, 0]


def values(config: Config, params, tokens, seen, *, how=DEFAULT):
    """What a critic expects to be earned from each token on, before the token is chosen.

        V[b, t] = score at the token that stands before t in its text,   0 for the first of a text

    So column t speaks of ``tokens[:, t]``, as the values of ``advantages.gae`` and ``losses.value`` do, and for one
    text a row V[:, 1:] is score[:, :-1]: what TRL's PPO takes. What a critic expects behind the last token, for rows
    that were cut off (``advantages.gae_bootstrapped``), is ``rewards``.

    Args:
      config, params, tokens, how: as ``scores``.
      seen: which tokens are there, and of which text: one of the forms of ``visibility``. The first token of a branch
        comes after the last of its text's beginning.

    Returns:
      [B, T] float32; 0 for padding and where nothing stands before.

    Raises:
      ValueError: the model is a language model, or the shapes disagree.
    """
    of_tokens = scores(config, params, tokens, seen, how=how)
    T = tokens.shape[1]
    earlier = visibility.sight(seen).visible[:, 0] & jnp.tri(T, k=-1, dtype=bool)[None]
    before = jnp.where(earlier, jnp.arange(T)[None, None], -1).max(-1)  # -1: nothing
    out = jnp.take_along_axis(of_tokens, jnp.maximum(before, 0), 1)
    return jnp.where(_there(seen) & (before >= 0), out, 0)


def _there(seen):
    """[B, T] bool, whichever form ``seen`` has."""
    return (seen if seen.ndim == 2 else seen[..., 0]) != 0
