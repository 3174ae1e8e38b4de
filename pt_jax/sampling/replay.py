"""Completions that are given, scored by the program that samples."""

import jax
import jax.numpy as jnp
import numpy as np

from pt_jax import checks
from pt_jax.sampling import asked
from pt_jax.sampling.decode import sample


def score(params, prompts, seen, tokens, alive, *, group=1, **settings):
    """The log-probabilities that ``sample`` gives the tokens of completions, to the last bit where it drew them.

        logps[b, n] = log p(tokens[b, n] | prompt b, tokens[b, :n])

    It is the loop of ``sample`` with the tokens given instead of drawn: one token of each row is read at a time. Where
    rounding may differ, ``models.apply`` reads all at once, in less time.

    Args:
      params: of the model.
      prompts, seen: [P, T], as ``sample``.
      tokens: [P * G, N] int32, completions, those of a prompt after each other.
      alive: [P * G, N] bool, True up to and with the last token of each.
      group: G.
      **settings: what else ``sample`` was given, but for ``length``, ``limits`` and ``forced``.

    Returns:
      [P * G, N] float32, in nats; 0 after the end.

    Raises:
      ValueError: as ``sample``, of which ``tokens`` are ``forced``; or a row is alive behind its end.

    >>> table = jnp.log(jnp.array([[0.5, 0.5], [0.2, 0.8]]))  # the next token by the last
    >>> model = {
    ...     "apply": lambda params, tokens, seen, cache: (params[tokens], cache),
    ...     "init_cache": lambda rows, length: {"read": jnp.zeros((rows, length))},
    ...     "end_tokens": (), "pad_token": 0,
    ... }
    >>> prompt, tokens = jnp.array([[0]]), jnp.array([[1, 0, 0]])
    >>> logps = score(table, prompt, prompt == 0, tokens, jnp.array([[True, True, False]]), **model)
    >>> print(jnp.exp(logps).round(3))
    [[0.5 0.2 1. ]]
    """
    size = checks.shapes(tokens=(tokens, "B N"), alive=(alive, "B N"))
    given = asked.known(alive)
    if given is not None and (bad := np.flatnonzero((given[:, 1:] > given[:, :-1]).any(1))).size:
        raise ValueError(
            f"row {bad[0]} of alive goes on behind its end; it must be True up to the last token, and no more"
        )
    limits = np.maximum(given.sum(1), 1) if given is not None else jnp.maximum(alive.sum(1), 1)
    out = sample(
        params,
        prompts,
        seen,
        jax.random.key(0),
        length=size["N"],
        group=group,
        limits=limits,
        forced=tokens,
        **settings,
    )
    return jnp.where(alive, out.logps, 0)
