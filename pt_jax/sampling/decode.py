"""Autoregressive sampling as one jitted program: prefill each prompt once, then one ``lax.scan`` over new tokens."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from pt_jax import checks
from pt_jax.sampling.distribution import Sampling, draw, transform


@struct.dataclass
class Completions:
    """What was sampled, B = P * G rows ordered by prompt.

    Args:
      tokens: [B, N] int32; after a row's end ``pad``.
      logps: [B, N] float32, of each token in the distribution that it was drawn from, in nats; 0 after the end.
      alive: [B, N] bool, True up to and with the end token: these tokens were sampled, the others only fill.
    """

    tokens: jax.Array
    logps: jax.Array
    alive: jax.Array


def sample(
    params, prompts, seen, key, *, apply, init_cache, length, end_tokens, pad_token, group=1, how=None, prompt_ids=None
) -> Completions:
    """Samples ``group`` completions of each prompt.

    The token at position n of sample j of prompt p is drawn with the key fold_in(fold_in(fold_in(key, p), j), n):
    it does not depend on which other prompts are in the batch, on their order, or on how much padding there is.

    Args:
      params: of the model.
      prompts: [P, T] int32, left-padded.
      seen: [P, T] bool, True for the prompt's tokens.
      key: PRNG key; it is consumed.
      apply: ``(params, tokens, seen, cache) -> (logits, cache)``, such as ``partial(models.apply, config)``.
      init_cache: ``(rows, length) -> cache``, such as ``partial(models.init_cache, config)``.
      length: N, the most tokens to sample.
      end_tokens: ids that end a completion; the end token belongs to it.
      pad_token: id to fill up with; it may be an end token.
      group: G, completions a prompt. The prompt is read once for all of them.
      how: the sampled distribution; a ``Sampling()`` at temperature 1 when None.
      prompt_ids: [P] int32 that address the random numbers; 0 to P - 1 when None.

    Returns:
      ``Completions`` of P * G rows, sample j of prompt p in row p * G + j.

    Raises:
      ValueError: the shapes disagree, a prompt is empty or not left-padded, or a number is out of range.
    """
    size = checks.shapes(prompts=(prompts, "P T"), seen=(seen, "P T"))
    if prompt_ids is not None:
        checks.shapes(prompts=(prompts, "P T"), prompt_ids=(prompt_ids, "P"))
    checks.positive("length", length)
    checks.positive("group", group)
    if not isinstance(seen, jax.core.Tracer):
        given = np.asarray(seen)  # of jnp, these would be staged when sample is jitted around them
        if given.shape[1] == 0:
            raise ValueError("prompts has no column: each prompt must have a token at least")
        bad = np.flatnonzero(~(given[:, -1] & (given[:, 1:] >= given[:, :-1]).all(-1)))
        if bad.size:
            raise ValueError(f"prompt {bad[0]} is empty or not left-padded: its last column must be seen, and no gap")
    how = (Sampling() if how is None else how).check()
    ids = jnp.arange(size["P"]) if prompt_ids is None else jnp.asarray(prompt_ids)
    ends = jnp.asarray(tuple(end_tokens), jnp.int32)
    return _sample(
        params, prompts, seen, key, ids, how, ends, pad_token,
        apply=apply, init_cache=init_cache, length=length, group=group,
    )  # fmt: skip


@partial(jax.jit, static_argnames=("apply", "init_cache", "length", "group"))
def _sample(params, prompts, seen, key, ids, how, ends, pad, *, apply, init_cache, length, group):
    P, T = prompts.shape
    logits, cache = apply(params, prompts, seen, init_cache(P, T + length))
    # Before the rows are repeated: it is less work, and an argmax over 17 to 24 columns, fused with a repeat to a
    # multiple of 8 rows, is a program that XLA (jaxlib 0.10.2, CPU) never finishes compiling.
    first = jnp.repeat(transform(logits[:, -1], how), group, 0)
    cache = _repeat_rows(cache, partial(init_cache, length=T + length), group)
    of_prompt = jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)
    of_row = jax.vmap(lambda k: jax.vmap(lambda j: jax.random.fold_in(k, j))(jnp.arange(group)))(of_prompt)
    of_row = of_row.reshape(-1)

    def emit(n, logits, alive):
        token = draw(jax.vmap(lambda k: jax.random.fold_in(k, n))(of_row), logits)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], 1)[:, 0]
        return Completions(jnp.where(alive, token, pad), jnp.where(alive, logp, 0), alive)

    def step(carry, n):
        cache, last = carry
        logits, cache = apply(params, last.tokens[:, None], last.alive[:, None], cache)
        out = emit(n, transform(logits[:, 0], how), last.alive & ~jnp.isin(last.tokens, ends))
        return (cache, out), out

    first = emit(0, first, jnp.ones(P * group, bool))
    _, rest = jax.lax.scan(step, (cache, first), jnp.arange(1, length))
    return jax.tree.map(lambda x, xs: jnp.concatenate([x[:, None], xs.T], 1), first, rest)


def _repeat_rows(cache, init_cache, group):
    """Every row of the cache ``group`` times. Its row axes are those that grow with the number of rows."""
    one, two = jax.eval_shape(lambda: (init_cache(1), init_cache(2)))

    def repeat(x, a, b):
        axis = next((i for i, (m, n) in enumerate(zip(a.shape, b.shape)) if m != n), None)
        return x if axis is None else jnp.repeat(x, group, axis)

    return jax.tree.map(repeat, cache, one, two)
