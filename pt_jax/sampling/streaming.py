"""Sampling with a look at every few tokens from outside of the program: to show them, and to stop where a text says so.

The steps are those of ``sample``, and so are the tokens. A few steps at a time are one program, after which the host
reads what was drawn, in one transfer. Rows that it has stopped are drawn on, as long as others go on, and not read.
``timings`` are taken when tokens have come to the host anyway, and stand still until more are asked for.
"""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import numpy as np

from pt_jax import checks
from pt_jax.sampling import asked, decode
from pt_jax.sampling.decode import Completions
from pt_jax.sampling.timings import Watch

PER_TOKEN = ("tokens", "logps", "alive", "entropies", "alternatives", "alternative_logps")


def stream(
    params, prompts, seen, key, *, apply, init_cache, length, end_tokens, pad_token, group=1, how=None, prompt_ids=None,
    limits=None, forced=None, entropies=False, keep=(), alternatives=0, shared_prefix=True,
    until: Callable[[list[int], int], int | None] | None = None, chunk=8,
) -> Iterator[Completions]:  # fmt: skip
    """Samples as ``sample`` does, and yields every few tokens as soon as they are there.

    All that is yielded, side by side, is what ``sample`` returns, up to the step at which the last row ended.

    Args:
      params, prompts, seen, key, apply, init_cache, length, end_tokens, pad_token, group, how, prompt_ids, limits,
        forced, entropies, keep, alternatives, shared_prefix: as ``sample``; what is kept of the cache comes with the
        last piece.
      until: what is asked of every row that has new tokens, with all of its tokens so far, and how many of them it was
        asked about before: how many are the completion if it is to stop there, None to go on. See ``text.stop_at``.
        Tokens after that are taken back.
      chunk: steps between two looks, at most 16; no sample depends on it.

    Yields:
      ``Completions`` in numpy, [B, chunk] each; ``ended`` and ``stopped`` [B] and ``timings`` say what is so by now.
        What is done with them between two pieces is not in the timings; what ``until`` takes is.

    Raises:
      ValueError: as ``sample``; chunk is out of range, or until is no function.
    """
    program, given = decode.prepared(
        prompts, seen, key, apply=apply, init_cache=init_cache, length=length, end_tokens=end_tokens,
        pad_token=pad_token, group=group, how=how, prompt_ids=prompt_ids, limits=limits, forced=forced,
        entropies=entropies, keep=keep, alternatives=alternatives, shared_prefix=shared_prefix,
    )  # fmt: skip
    asked.counts(chunk=chunk)
    checks.between("chunk", chunk, 1, decode.CHUNK + 1)
    if until is not None and not callable(until):
        raise ValueError(f"until must be a function of a row's tokens, such as text.stop_at gives, got {until!r}")
    asked.check(
        program, params, prompts, seen, how=how, end_tokens=end_tokens, pad_token=pad_token, limits=limits,
        forced=forced,
    )  # fmt: skip
    decode.check_keep(program, np.shape(prompts)[1])
    return _chunks(program, given, params, prompts, seen, until, min(chunk, length))


def sample_until(params, prompts, seen, key, *, length, pad_token, **settings) -> Completions:
    """``sample`` with rows that stop where ``until`` says so: one round trip to the host every few tokens.

    Args:
      params, prompts, seen, key, length, pad_token: as ``sample``.
      **settings: the others of ``stream``.

    Returns:
      ``Completions`` of P * G rows and N columns, in numpy.
    """
    parts = list(stream(params, prompts, seen, key, length=length, pad_token=pad_token, **settings))
    last, names = parts[-1], [name for name in PER_TOKEN if getattr(parts[-1], name) is not None]
    joined = {name: np.concatenate([getattr(x, name) for x in parts], 1) for name in names}
    rest = length - joined["tokens"].shape[1]
    filled = {name: np.pad(x, ((0, 0), (0, rest), *((0, 0),) * (x.ndim - 2))) for name, x in joined.items()}
    filled["tokens"] = np.where(filled["alive"], filled["tokens"], np.int32(pad_token))
    return Completions(**filled, ended=last.ended, stopped=last.stopped, kept=last.kept, timings=last.timings)


def _chunks(program, given, params, prompts, seen, until, chunk):
    """The generator behind ``stream``, whose arguments are checked before anybody asks for a token."""
    watch = Watch()
    try:
        for part, tokens in _pieces(program, given, params, prompts, seen, until, chunk):
            yield part.replace(timings=watch.read(tokens))
            watch.go_on()
    finally:
        watch.stop()


def _pieces(program, given, params, prompts, seen, until, chunk):
    """What is yielded, and how many tokens there are so far."""
    read, rows = np.shape(prompts)[1] - 1, len(prompts) * program.group
    whole, for_tokens = read + chunk * -(-program.length // chunk), read + 1 + program.length
    rooms, room = iter(decode.rooms_of(read, whole, chunk)), read
    state, prefix, keys = _begun(program, for_tokens, params, prompts, seen, given)
    shared = 0 if prefix is None else read  # columns that the rows' own cache is without
    texts, ended, stopped, count = [[] for _ in range(rows)], np.zeros(rows, bool), np.zeros(rows, bool), 0
    for first in range(0, program.length, chunk):
        if read + first == room:
            room = next(rooms)
            state = _grown(program, for_tokens, room - shared, state)
        state, new, going = _advanced(program, chunk, params, given, keys, prefix, state)
        new, going, ends, pad = jax.device_get((new, going, given.ends, given.pad))
        new = {name: np.array(x.swapaxes(0, 1)[:, : program.length - first]) for name, x in new.items()}
        if until is not None:
            stopped = _stop(until, texts, new, stopped)
        alive = new["alive"]
        new |= {name: np.where(decode.over(alive, x), x, x.dtype.type(0)) for name, x in new.items() if name != "alive"}
        new["tokens"] = np.where(alive, new["tokens"], pad)
        ended, count = ended | (alive & np.isin(new["tokens"], ends)).any(1), count + int(alive.sum())
        last = first + chunk >= program.length or not (going & ~stopped).any()
        kept = jax.device_get(_kept(program, for_tokens, prefix, state)) if last and program.keep else {}
        yield Completions(**new, ended=ended, stopped=stopped, kept=kept), count
        if last:
            return


def _stop(until, texts, new, stopped):
    """Asks of every row that has new tokens, and takes back those behind its end; returns which rows are stopped."""
    new["alive"][stopped] = False
    stopped = stopped.copy()
    for row in np.flatnonzero(new["alive"].any(1)):
        said, before = texts[row], len(texts[row])
        said.extend(new["tokens"][row, new["alive"][row]].tolist())
        count = until(said, before)
        if count is not None and not asked.is_whole(count):
            raise ValueError(f"until must return how many tokens are the completion, or None, got {count!r}")
        if count is not None:
            new["alive"][row, max(count - before, 0) :] = False
            stopped[row] = True
    return stopped


@partial(jax.jit, static_argnums=(0, 1))
def _kept(program, tokens, prefix, state):
    return decode.kept_of(program, state.cache, prefix, len(state.alive), tokens)


@partial(jax.jit, static_argnums=(0, 1))
def _begun(program, asked, params, prompts, seen, given):
    cache = partial(decode.cache_of, program.init_cache, asked=asked)
    keys = decode.row_keys(given.key, given.ids, program.group)
    return *decode.begin(program, params, prompts, seen, given, cache), keys


@partial(jax.jit, static_argnums=(0, 1, 2))
def _grown(program, asked, room, state):
    larger = decode.cache_of(program.init_cache, len(state.alive), room, asked=asked)
    return state._replace(cache=jax.tree.map(decode.fitted, state.cache, larger))


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=6)
def _advanced(program, chunk, params, given, keys, prefix, state):
    """Some steps more of the rows that go on: the state, what the steps drew [chunk, B], and which rows go on [B]."""
    program = program._replace(apply=decode.behind(program.apply, prefix))
    step = lambda state, _: (decode.take_step(program, params, given, keys, state), None)
    state, _ = jax.lax.scan(step, state, length=chunk)
    new = {name: jax.lax.dynamic_slice_in_dim(x, state.done - chunk, chunk) for name, x in state.out.items()}
    return state, new, decode.going(state, given)
