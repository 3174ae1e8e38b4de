"""The best of several completions: of samples by any score, or of all continuations by beam search."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pt_jax import checks
from pt_jax.sampling import asked, decode, penalties
from pt_jax.sampling.decode import Completions
from pt_jax.sampling.distribution import NUMBERS, transform

NEVER = -1e9  # added to what must not be chosen, as transformers does


def best_of(completions: Completions, scores) -> Completions:
    """Of each prompt's samples the one with the highest score: best-of-n.

    Args:
      completions: of P * G rows.
      scores: [P, G], such as rewards, or log-probabilities ``completions.logps.sum(-1)``; NaN where there is none.

    Returns:
      ``Completions`` of P rows; of equals the first. ``kept`` is left out.

    Raises:
      ValueError: the shapes disagree, or a prompt has no score.

    >>> tokens = jnp.array([[1], [2], [3], [4]])
    >>> out = Completions(tokens, jnp.zeros((4, 1)), jnp.ones((4, 1), bool))
    >>> best_of(out, jnp.array([[0.5, 0.7], [0.9, jnp.nan]])).tokens.tolist()
    [[2], [3]]
    """
    checks.shapes(scores=(scores, "P G"))
    (P, G), rows = np.shape(scores), len(completions.tokens)
    if rows != P * G:
        raise ValueError(f"scores has shape {(P, G)}, expected [P, G] with P * G = {rows} rows of completions")
    if not isinstance(scores, jax.core.Tracer) and (bad := np.flatnonzero(np.isnan(scores).all(1))).size:
        raise ValueError(f"prompt {bad[0]} has no score: those of all its samples are NaN")
    scores = jnp.asarray(scores, jnp.float32)
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, jnp.maximum(scores, jnp.finfo(jnp.float32).min))
    best = jnp.arange(P) * G + jnp.argmax(scores, 1)
    return jax.tree.map(lambda x: jnp.asarray(x)[best], completions.replace(kept={}, timings=None))


class _Beams(NamedTuple):
    """P prompts with K texts each, the best first."""

    tokens: jax.Array  # [P, K, N]
    logps: jax.Array  # [P, K, N]
    length: jax.Array  # [P, K]
    score: jax.Array  # [P, K]


class _State(NamedTuple):
    """After ``done`` tokens: beams that go on, and the best that have ended."""

    cache: object
    history: penalties.History | None
    open: _Beams
    over: _Beams
    full: jax.Array  # [P, K] bool, which places of ``over`` are taken
    better: jax.Array  # [P] bool, whether an open beam may yet be better than those that are over
    done: jax.Array


def beam_search(
    params, prompts, seen, *, apply, init_cache, length, end_tokens, pad_token, beams, how=None, length_penalty=1.0,
    shared_prefix=True,
):  # fmt: skip
    """The likeliest completions that a search finds which goes on with the ``beams`` best of each length.

        score = sum of log-probabilities / tokens^length_penalty

    The search of transformers' ``generate(num_beams=K, early_stopping=False)``, and the same tokens: of the best
    continuations of all beams those that end are put aside, and the others go on, until none that goes on has a higher
    score than the worst of K that are over. ``how`` works on log-probabilities, which are not normalised again.

    Args:
      params, prompts, seen, apply, init_cache, length, end_tokens, pad_token, shared_prefix: as ``sample``; a group are
        the beams of a prompt, and only what they do not share is moved when a beam goes on from another.
      beams: K.
      how: penalties, ``allowed`` and ``min_length``, for all rows; or None.
      length_penalty: above 0 favours long completions.

    Returns:
      ``Completions`` of P * K rows, those of a prompt from the best to the worst, with the log-probabilities that were
      added up; and their scores [P, K]. Where fewer than K completions are possible at all, the last rows have no
      token, and a score of -1e9 or less.

    Raises:
      ValueError: as ``sample``; the temperature is 0, a number of ``how`` is one a row, or length_penalty is none.
    """
    asked.counts(beams=beams)
    program, given = decode.prepared(
        prompts, seen, jax.random.key(0), apply=apply, init_cache=init_cache, length=length, end_tokens=end_tokens,
        pad_token=pad_token, group=beams, how=how, prompt_ids=None, limits=None, shared_prefix=shared_prefix,
    )  # fmt: skip
    asked.check(program, params, prompts, seen, how=how, end_tokens=end_tokens, pad_token=pad_token)
    for name in NUMBERS:
        if (shape := np.shape(getattr(given.how, name))) != ():
            raise ValueError(f"{name} has shape {shape}; beams have no row of their own, so give one number for all")
    checks.positive("temperature", given.how.temperature)  # at 0 all but one continuation are impossible
    asked.number("length_penalty", length_penalty)
    return _search(program, params, prompts, seen, given, jnp.float32(length_penalty))


@partial(jax.jit, static_argnums=0)
def _search(program, params, prompts, seen, given, length_penalty):
    (P, T), K, N = prompts.shape, program.group, program.length
    sized = partial(decode.cache_of, program.init_cache, asked=T + N)
    begun, prefix = decode.begin(program, params, prompts, seen, given, sized)
    program = program._replace(apply=decode.behind(program.apply, prefix))
    cache = jax.tree.map(decode.fitted, begun.cache, sized(P * K, T - 1 + N if prefix is None else N))
    none = _Beams(
        tokens=jnp.full((P, K, N), given.pad), logps=jnp.zeros((P, K, N)), length=jnp.zeros((P, K), jnp.int32),
        score=jnp.full((P, K), NEVER),
    )  # fmt: skip
    # all beams of a prompt are the same at first: one of them goes on
    first = none._replace(score=none.score.at[:, 0].set(0.0))
    state = _State(cache, begun.history, first, none, jnp.zeros((P, K), bool), jnp.ones(P, bool), jnp.int32(0))
    state = jax.lax.while_loop(
        lambda state: state.better.any() & (state.done < N),
        lambda state: _step(program, params, given, length_penalty, begun.token, state),
        state,
    )
    rows = jax.tree.map(lambda x: x.reshape(P * K, *x.shape[2:]), state.over)
    alive = jnp.arange(N)[None] < rows.length[:, None]
    tokens, logps = jnp.where(alive, rows.tokens, given.pad), jnp.where(alive, rows.logps, 0)
    ended = (alive & jnp.isin(tokens, given.ends)).any(-1)
    return Completions(tokens, logps, alive, ended), state.over.score


def _step(program, params, given, length_penalty, prompt_ends, state):
    """Reads the last token of every beam and goes on with the best of what may come next."""
    P, K, N, n = *state.open.tokens.shape, state.done
    last = jnp.where(n == 0, prompt_ends, state.open.tokens[:, :, jnp.maximum(n - 1, 0)].reshape(-1))
    logits, cache = program.apply(params, last[:, None], jnp.ones((P * K, 1), bool), state.cache)
    logps = transform(jax.nn.log_softmax(logits[:, 0].astype(jnp.float32)), given.how, n, state.history)
    found, beam = _continued(state.open, logps.reshape(P, K, -1), n, max(2, 1 + len(given.ends)) * K)
    ends = jnp.isin(found.tokens[:, :, n], given.ends) | (n + 1 == N)
    # those that go on, and what is remembered of them
    score, chosen = jax.lax.top_k(found.score + ends * NEVER, K)
    going_on = _taken(found, chosen)._replace(score=score)
    rows = (jnp.take_along_axis(beam, chosen, 1) + jnp.arange(P)[:, None] * K).reshape(-1)
    cache = decode.of_rows(cache, lambda rows: program.init_cache(rows, N), lambda x, axis: jnp.take(x, rows, axis))
    history = jax.tree.map(lambda x: x[rows], state.history)
    token, all_rows = going_on.tokens[:, :, n].reshape(-1, 1), jnp.ones((P * K, 1), bool)
    history = penalties.after(history, token, all_rows, all_rows)
    # those that are over, among which only the K best continuations come
    may = ends & (jnp.arange(ends.shape[1]) < K)[None] & state.better[:, None]
    ended = found._replace(score=found.score / (n + 1) ** length_penalty + ~may * NEVER)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), state.over, ended)
    best = jax.lax.top_k(both.score, K)[1]
    over, full = _taken(both, best), jnp.take_along_axis(jnp.concatenate([state.full, may], 1), best, 1)
    worst = jnp.where(full.all(1), over.score.min(1), NEVER)
    better = state.better & (going_on.score[:, 0] / (n + 1) ** length_penalty > worst)
    return _State(cache, history, going_on, over, full, better, n + 1)


def _continued(beams, logps, n, count):
    """The ``count`` best continuations of a prompt's beams by one token, and which beam [P, count] each comes from."""
    P, K, V = logps.shape
    score, index = jax.lax.top_k((logps + beams.score[:, :, None]).reshape(P, K * V), min(count, K * V))
    beam, token = index // V, index % V
    found = _taken(beams, beam)
    of_token = jnp.take_along_axis(logps.reshape(P, K * V), index, 1)
    return _Beams(
        tokens=found.tokens.at[:, :, n].set(token), logps=found.logps.at[:, :, n].set(of_token),
        length=jnp.full_like(found.length, n + 1), score=score,
    ), beam  # fmt: skip


def _taken(beams, which):
    """Of each prompt's beams those that are meant, ``which`` [P, M]."""
    take = lambda x: jnp.take_along_axis(x, which.reshape(*which.shape, *(1,) * (x.ndim - 2)), 1)
    return jax.tree.map(take, beams)
