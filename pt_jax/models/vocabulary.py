"""More or fewer token ids: rows of the embedding and the unembedding that are added, or dropped."""

import dataclasses

import jax
import jax.numpy as jnp

from pt_jax import checks
from pt_jax.models import linear
from pt_jax.models.config import Config

NOISE = 1e-5  # share of the old rows' covariance that new rows have of their own


def resize(params, config: Config, vocab: int, key=None, *, multiple_of: int = 1):
    """A model with room for this many token ids; the other arrays are shared.

        new row = m,                          m the mean of the old rows, of embedding and unembedding each
        new row ~ Normal(m, 1e-5 Sigma),      with a key; Sigma the covariance of the old rows

    So a new id's logit is the mean of the old ones, and its probability at most 1 / (old ids + new ids): a model of
    V ids that is given N more loses at most log((V + N) / V) nats a token. Rows near 0 instead can have nearly all of
    the probability, where the old logits are below 0 (Hewitt 2021,
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html). Logits of old ids stay as they were, to rounding.

    Ids that are there only for ``multiple_of`` are ids like all others: they are not taken out of softmax or sampling.

    Args:
      params: of a model, embedding and unembedding as plain arrays.
      config: its config.
      vocab: number of ids; fewer than now drops the last ones.
      key: PRNG key, or None.
      multiple_of: rounds ``vocab`` up, to 128 for the tiles of a TPU, or to the devices that split the vocabulary.

    Returns:
      params, config. Rows keep their type; the mean is taken in float32.

    Raises:
      ValueError: a number is below 1, a special token would be dropped, or the embedding is no plain array.

    >>> config = Config(vocab=2, layers=1, width=2, heads=1, kv_heads=1, head_width=2, hidden=2)
    >>> params, config = resize({"embed": jnp.array([[1.0, 5.0], [3.0, 7.0]])}, config, 3)
    >>> print(params["embed"], config.vocab)
    [[1. 5.]
     [3. 7.]
     [2. 6.]] 3
    """
    checks.positive("vocab", vocab)
    checks.positive("multiple_of", multiple_of)
    vocab = -(-vocab // multiple_of) * multiple_of
    special = {"bos_token": config.bos_token, "pad_token": config.pad_token}
    special |= {f"end_tokens[{i}]": token for i, token in enumerate(config.end_tokens)}
    for name, token in special.items():
        if token is not None and token >= vocab:
            raise ValueError(
                f"vocab={vocab} drops config.{name}, which is {token}; give it another id, or keep more ids"
            )
    out = dict(params)
    for i, name in enumerate(name for name in ("embed", "unembed") if name in params):
        if isinstance(params[name], linear.Weight):
            raise ValueError(f"params[{name!r}] is a {type(params[name]).__name__}; fold or dequantise it first")
        out[name] = _resized(params[name], vocab, None if key is None else jax.random.fold_in(key, i))
    return out, dataclasses.replace(config, vocab=vocab)


def _resized(rows, vocab, key):
    old, more = rows.astype(jnp.float32), vocab - len(rows)
    if more <= 0:
        return rows[:vocab]
    new = mean = jnp.broadcast_to(old.mean(0, keepdims=True), (more, old.shape[1]))
    if key is not None:  # a normal sum of what the old rows differ from their mean by has their covariance
        new = mean + jnp.sqrt(NOISE / len(old)) * jax.random.normal(key, (more, len(old))) @ (old - mean[:1])
    return jnp.concatenate([rows, new.astype(rows.dtype)])


def check(tokenizer, config: Config, source) -> None:
    """Fails when a tokenizer has an id that the embedding has no row for.

    Args:
      tokenizer: of transformers.
      config: of the model.
      source: what the message begins with, such as the folder.
    """
    ids = max(tokenizer.get_vocab().values(), default=-1) + 1
    if ids > config.vocab:
        raise ValueError(
            f"{source}: the tokenizer has ids up to {ids - 1}, the embedding only {config.vocab} rows; "
            f"grow it with models.vocabulary.resize(params, config, {ids})"
        )
