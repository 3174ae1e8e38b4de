"""Penalties on tokens that were there before, and the record of which were; kept only where a penalty asks for it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class History(NamedTuple):
    """What came before a token; None where no penalty looks at it.

    Args:
      occurred: [..., V] bool, the tokens of the prompt and of the completion so far; for the repetition penalty.
      counts: [..., V] int32, how often each is in the completion so far; for frequency and presence penalties.
    """

    occurred: jax.Array | None = None
    counts: jax.Array | None = None


def repetition(logits, occurred, penalty):
    """Makes what was there before less likely (a penalty above 1) or more.

        l / penalty where l >= 0, l * penalty where l < 0, of tokens that occurred

    Keskar et al. 2019, https://arxiv.org/abs/1909.05858, section 4.1; the case below 0 is transformers'. It looks at
    the logits as they are: a constant added to all of them changes the distribution.

    Args:
      logits: [..., V] float32.
      occurred: [..., V] bool, tokens of prompt and completion.
      penalty: above 0; 1 changes nothing.

    >>> print(repetition(jnp.array([2.0, -2.0, 2.0]), jnp.array([True, True, False]), 2.0))
    [ 1. -4.  2.]
    """
    return jnp.where(occurred, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def frequency(logits, counts, penalty):
    """Takes ``penalty`` off a logit for each time that its token is in the completion: l - penalty * count.

    OpenAI's frequency penalty; the prompt does not count.

    Args:
      logits: [..., V] float32.
      counts: [..., V] int32.
      penalty: any number; 0 changes nothing.

    >>> print(frequency(jnp.array([1.0, 1.0]), jnp.array([0, 3]), 0.5))
    [ 1.  -0.5]
    """
    return logits - penalty * counts.astype(jnp.float32)


def presence(logits, counts, penalty):
    """Takes ``penalty`` off the logits of tokens that are in the completion, however often: l - penalty [count > 0].

    OpenAI's presence penalty; the prompt does not count.

    Args:
      logits: [..., V] float32.
      counts: [..., V] int32.
      penalty: any number; 0 changes nothing.

    >>> print(presence(jnp.array([1.0, 1.0]), jnp.array([0, 3]), 0.5))
    [1.  0.5]
    """
    return logits - penalty * (counts > 0).astype(jnp.float32)


def penalised(logits, how, history: History | None):
    """All penalties of a ``Sampling``, in the order of vLLM: repetition, frequency, presence."""
    if not asks(how):
        return logits
    if history is None:
        raise ValueError(
            "the penalties depend on the tokens before; give transform the history, or call scored_logits on whole rows"
        )
    if how.repetition_penalty is not None:
        logits = repetition(logits, history.occurred, how.repetition_penalty)
    if how.frequency_penalty is not None:
        logits = frequency(logits, history.counts, how.frequency_penalty)
    if how.presence_penalty is not None:
        logits = presence(logits, history.counts, how.presence_penalty)
    return logits


def asks(how) -> bool:
    """Whether a ``Sampling`` looks at the tokens before."""
    return how.repetition_penalty is not None or _counts(how)


def _counts(how) -> bool:
    return how.frequency_penalty is not None or how.presence_penalty is not None


# ---- the record


def empty(how, rows: int, vocab: int) -> History | None:
    """Nothing said yet in any row; None when nobody asks."""
    if not asks(how):
        return None
    return History(
        occurred=None if how.repetition_penalty is None else jnp.zeros((rows, vocab), bool),
        counts=jnp.zeros((rows, vocab), jnp.int32) if _counts(how) else None,
    )


def after(history: History | None, tokens, seen, mask) -> History | None:
    """The history with more tokens in it.

    Args:
      history: [B, V] each, or None.
      tokens: [B, T] int32.
      seen: [B, T] bool, False for padding.
      mask: [B, T] bool, those of the completion.
    """
    if history is None:
        return None
    at = jnp.arange(len(tokens))[:, None], tokens
    return History(
        occurred=None if history.occurred is None else history.occurred.at[at].max(seen),
        counts=None if history.counts is None else history.counts.at[at].add(mask.astype(jnp.int32)),
    )


def of_prompts(how, prompts, seen, vocab: int | None, group: int) -> History | None:
    """The history [P * G, V] before the first token of each completion."""
    history = after(empty(how, len(prompts), vocab), prompts, seen, jnp.zeros(prompts.shape, bool))
    return jax.tree.map(lambda x: jnp.repeat(x, group, 0), history)


def of_columns(history: History | None, tokens, seen, mask) -> History | None:
    """A history [B, V] with more and more columns in it: after each, [B, T, V], as large as the logits.

    Args:
      history: what came before the first column, or None.
      tokens, seen, mask: as ``after``.
    """
    if history is None:
        return None

    def step(history, column):
        history = after(history, *(x[:, None] for x in column))
        return history, history

    _, columns = jax.lax.scan(step, history, (tokens.T, seen.T, mask.T))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), columns)
