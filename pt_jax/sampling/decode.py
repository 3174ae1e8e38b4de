"""Autoregressive sampling as one jitted program: each prompt is read once, then tokens are drawn until all rows end.

The loop is a ``lax.scan`` of a few steps inside a ``lax.while_loop`` that ends with the last row. The cache grows with
the texts, from one room to the next: a token attends to what is there, not to what might come.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from pt_jax.sampling import asked, penalties
from pt_jax.sampling.distribution import Sampling, draw, transform
from pt_jax.sampling.timings import Timings

CHUNK = 16  # steps between two looks at whether any row goes on
GROWTH = 1.5  # of the cache, from room to room
PIECE = 512  # tokens of a prompt that are read at once


@struct.dataclass
class Completions:
    """What was sampled, B = P * G rows ordered by prompt.

    Args:
      tokens: [B, N] int32; after a row's end ``pad``.
      logps: [B, N] float32, of each token in the distribution that it was drawn from, in nats; 0 after the end.
      alive: [B, N] bool, True up to and with the end token: these tokens were sampled, the others only fill.
      ended: [B] bool, whether an end token ended the row; else its limit did, or a stop string.
      entropies: [B, N] float32, of the distributions that were drawn from, in nats; None unless asked for.
      alternatives: [B, N, k] int32, the k likeliest tokens of these distributions, the likeliest first; None unless
        asked for.
      alternative_logps: [B, N, k] float32, of each of them, in nats; -inf where fewer tokens can be drawn at all.
      kept: leaves of the cache by name, those of ``keep``.
      stopped: [B] bool, whether a stop string ended the row; None where none was looked for.
      timings: how long it took, of what comes in pieces and of ``timed``; else None.
    """

    tokens: jax.Array
    logps: jax.Array
    alive: jax.Array
    ended: jax.Array | None = None
    entropies: jax.Array | None = None
    alternatives: jax.Array | None = None
    alternative_logps: jax.Array | None = None
    kept: dict[str, jax.Array] = struct.field(default_factory=dict)
    stopped: jax.Array | None = None
    timings: Timings | None = None

    @property
    def reasons(self) -> list[str]:
        """Why each row ended: "end" for an end token, else "stop" for a stop string, else "length" for its limit.

        >>> ended, stopped = np.array([True, False, False]), np.array([True, True, False])
        >>> Completions(None, None, None, ended=ended, stopped=stopped).reasons
        ['end', 'stop', 'length']
        """
        ended, stopped = jax.device_get((self.ended, self.stopped))
        stopped = np.zeros_like(ended) if stopped is None else stopped
        return ["end" if e else "stop" if s else "length" for e, s in zip(ended, stopped)]


class _Program(NamedTuple):
    """What is fixed when the program is compiled."""

    apply: Any
    init_cache: Any
    length: int
    group: int
    entropies: bool
    keep: tuple[str, ...]
    alternatives: int
    shared: bool  # whether a prompt's part of the cache is there once a group


class _Given(NamedTuple):
    """What may change from call to call without compiling anew: key [] or [B], ids [P], limits [B], forced [N, B]."""

    key: jax.Array
    ids: jax.Array
    how: Sampling
    ends: jax.Array
    pad: jax.Array
    limits: jax.Array
    forced: jax.Array


class _State(NamedTuple):
    """Between two steps: ``done`` tokens of every row are drawn, and the last, ``token``, is not yet read."""

    cache: Any
    out: dict[str, jax.Array]  # [N, B, ...] each
    token: jax.Array
    alive: jax.Array
    done: jax.Array
    history: penalties.History | None  # of all that was drawn and of the prompt


def sample(
    params, prompts, seen, key, *, apply, init_cache, length, end_tokens, pad_token, group=1, how=None, prompt_ids=None,
    limits=None, forced=None, entropies=False, keep=(), alternatives=0, shared_prefix=True,
) -> Completions:  # fmt: skip
    """Samples ``group`` completions of each prompt.

    The token at position n of sample j of prompt p is drawn with the key fold_in(fold_in(fold_in(key, p), j), n):
    it does not depend on which other prompts are in the batch, on their order, or on how much padding there is.

    Args:
      params: of the model.
      prompts: [P, T] int32, left-padded.
      seen: [P, T] bool, True for the prompt's tokens.
      key: PRNG key; it is consumed. Or [P * G] keys, one a row: each is sampled as if it were alone with its key, as
        sample 0 of a prompt whose id is 0 unless ``prompt_ids`` say otherwise.
      apply: ``(params, tokens, seen, cache) -> (logits, cache)``, such as ``partial(models.apply, config)``.
      init_cache: ``(rows, length) -> cache``, such as ``partial(models.init_cache, config)``. An axis that grows with
        ``length`` holds one slot a token, filled from the front. Where it has an entry "longest" [n, 0], a prompt and
        its completion have no more than n tokens together, as where positions are learned.
      length: N, the most tokens to sample.
      end_tokens: ids that end a completion; the end token belongs to it. A negative id never comes.
      pad_token: id to fill up with; it may be an end token.
      group: G, completions a prompt. The prompt is read once for all of them.
      how: the sampled distribution; a ``Sampling()`` at temperature 1 when None. Its numbers may be [P * G], one a row.
      prompt_ids: [P] int32 that address the random numbers; 0 to P - 1 when None, of one key.
      limits: [P * G] int32, the most tokens of each row, from 1 to N; N when None.
      forced: [P * G, N] int32, tokens to take instead of drawing them, -1 where one is to be drawn. With the tokens of
        a former call this is its replay, with the same log-probabilities to the last bit: it is the same program. Of
        rows that a stop string has ended, give ``limits=alive.sum(1)`` too: what comes after is no token of theirs.
      entropies: whether to return them.
      keep: names of leaves of the cache to return, such as "routes".
      alternatives: k, how many of the likeliest tokens to return at every position.
      shared_prefix: whether the rows of a group read what their prompt left in the cache from one place, instead of a
        copy each; where the cache takes one (a dict with an entry "prefix", such as ``models.init_cache``'s). It costs
        a G-th of memory and bandwidth, and changes log-probabilities by their rounding.

    Returns:
      ``Completions`` of P * G rows, sample j of prompt p in row p * G + j.

    Raises:
      ValueError: the shapes disagree, a prompt is empty, too long or not left-padded, an id is not in the vocabulary,
        a number is out of range, the stops contradict each other, or something is to be kept that is no array of the
        cache, or of a shared one has no slot a token.
    """
    program, given = prepared(
        prompts, seen, key, apply=apply, init_cache=init_cache, length=length, end_tokens=end_tokens,
        pad_token=pad_token, group=group, how=how, prompt_ids=prompt_ids, limits=limits, forced=forced,
        entropies=entropies, keep=keep, alternatives=alternatives, shared_prefix=shared_prefix,
    )  # fmt: skip
    asked.check(
        program, params, prompts, seen, how=how, end_tokens=end_tokens, pad_token=pad_token, limits=limits,
        forced=forced,
    )  # fmt: skip
    return _sample(program, params, prompts, seen, given)


def prepared(
    prompts, seen, key, *, apply, init_cache, length, end_tokens, pad_token, group, how, prompt_ids, limits,
    forced=None, entropies=False, keep=(), alternatives=0, shared_prefix=False,
):  # fmt: skip
    """The checked arguments of ``sample``: what is fixed when the program is compiled, and what may change."""
    asked.functions(apply=apply, init_cache=init_cache)
    asked.counts(length=length, group=group)
    asked.check_alternatives(alternatives)
    P = asked.check_prompts(prompts, seen)
    rows, shared = P * group, bool(shared_prefix) and group > 1
    program = _Program(apply, init_cache, length, group, entropies, asked.names("keep", keep), alternatives, shared)
    key = asked.key_of(key, rows)
    given = _Given(
        key=key, ids=asked.ids_of(prompt_ids, P, key), how=asked.how_of(how, rows),
        ends=asked.ends_of(end_tokens), pad=asked.pad_of(pad_token), limits=asked.limits_of(limits, rows, length),
        forced=asked.forced_of(forced, rows, length),
    )  # fmt: skip
    return program, given


@partial(jax.jit, static_argnums=0)
def _sample(program, params, prompts, seen, given) -> Completions:
    read, rows = prompts.shape[1] - 1, len(prompts) * program.group
    chunk = _chunk(program.length)
    whole = read + chunk * -(-program.length // chunk)
    sized = partial(cache_of, program.init_cache, asked=prompts.shape[1] + program.length)
    check_keep(program, prompts.shape[1])
    keys = row_keys(given.key, given.ids, program.group)
    state, prefix = begin(program, params, prompts, seen, given, sized)
    step = partial(take_step, program._replace(apply=behind(program.apply, prefix)), params, given, keys)
    for room in rooms_of(read, whole, chunk):
        larger = sized(rows, room if prefix is None else room - read)
        state = state._replace(cache=jax.tree.map(fitted, state.cache, larger))
        state = jax.lax.while_loop(
            lambda state, room=room: going(state, given).any() & (read + state.done < room),
            lambda state: jax.lax.scan(lambda state, _: (step(state), None), state, length=chunk)[0],
            state,
        )
    out = {name: x[: program.length].swapaxes(0, 1) for name, x in state.out.items()}
    ended = (out["alive"] & jnp.isin(out["tokens"], given.ends)).any(-1)
    kept = kept_of(program, state.cache, prefix, rows, prompts.shape[1] + program.length)
    return Completions(**out, ended=ended, kept=kept)


def begin(program, params, prompts, seen, given, sized):
    """The state before the first token, and the cache of the prompts that the rows go on from; None where each row has
    its own. All of a prompt is read but its last token, which the first step reads.

    So nothing but a step makes logits: those of a whole prompt would be the largest array of all.
    """
    read, rows = prompts.shape[1] - 1, len(prompts) * program.group
    cache, prefix = sized(rows, 0), None
    if shares(program, read):
        prefix = read_prompts(program, params, prompts, seen, sized)
    elif read:
        cache = read_prompts(program, params, prompts, seen, sized)
        cache = repeat_rows(cache, lambda rows: sized(rows, read), program.group)
    return begun(program, params, prompts, seen, given, cache), prefix


def read_prompts(program, params, prompts, seen, sized):
    """The cache of P rows that have read their prompts, all but the last token, and have room for no other.

    Long ones are read in pieces: where attention is written out, its scores are of a piece and not of the whole.
    """
    P, read = prompts.shape[0], prompts.shape[1] - 1
    read_on = lambda cache, text: (program.apply(params, *text, cache)[1], None)
    rest = read % PIECE if read > PIECE else read
    first, others = ([x[:, at] for x in (prompts[:, :-1], seen[:, :-1])] for at in (slice(rest), slice(rest, None)))
    cache = read_on(sized(P, read), first)[0] if rest else sized(P, read)
    if rest == read:
        return cache
    return jax.lax.scan(read_on, cache, [x.reshape(P, -1, PIECE).swapaxes(0, 1) for x in others])[0]


def begun(program, params, prompts, seen, given, cache):
    """The state before the first token, of rows with this cache."""
    rows = len(prompts) * program.group
    # scans write whole chunks, so there may be more steps than are asked for
    out = blank((program.length + CHUNK, rows), given.pad, program)
    token = jnp.repeat(prompts[:, -1], program.group)
    vocab = asked.vocabulary(program, params) if penalties.asks(given.how) else None
    history = penalties.of_prompts(given.how, prompts, seen, vocab, program.group)
    return _State(cache, out, token, jnp.ones(rows, bool), jnp.int32(0), history)


def blank(shape, pad, program) -> dict:
    """Where tokens are written down, and what there is to say of each."""
    out = {"tokens": jnp.full(shape, pad), "logps": jnp.zeros(shape), "alive": jnp.zeros(shape, bool)}
    if program.entropies:
        out["entropies"] = jnp.zeros(shape)
    if program.alternatives:
        shape = (*shape, program.alternatives)
        out |= {"alternatives": jnp.zeros(shape, jnp.int32), "alternative_logps": jnp.zeros(shape)}
    return out


def row_keys(key, ids, group):
    """The key of sample j of prompt p, in row p * G + j; of a key a row, each row's as if it were alone with it."""
    if key.ndim:
        return jax.vmap(lambda k, i: jax.random.fold_in(jax.random.fold_in(k, i), 0))(key, jnp.repeat(ids, group))
    of_prompt = jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)
    return jax.vmap(lambda k: jax.vmap(lambda j: jax.random.fold_in(k, j))(jnp.arange(group)))(of_prompt).reshape(-1)


def take_step(program, params, given, keys, state):
    """Reads the last token of every row and draws the next, of those rows that go on."""
    n, alive = state.done, going(state, given)
    logits, cache = program.apply(params, state.token[:, None], alive[:, None], state.cache)
    wanted = jax.lax.dynamic_index_in_dim(given.forced, jnp.minimum(n, len(given.forced) - 1), keepdims=False)
    of_token = jax.vmap(lambda k: jax.random.fold_in(k, n))(keys)
    now = spoken(logits[:, 0], given.how, n, of_token, wanted, state.history, program.alternatives)
    now = {name: jnp.where(over(alive, x), x, given.pad if name == "tokens" else 0) for name, x in now.items()}
    now["alive"] = alive
    write = lambda name: jax.lax.dynamic_update_index_in_dim(state.out[name], now[name], n, 0)
    history = penalties.after(state.history, now["tokens"][:, None], alive[:, None], alive[:, None])
    return _State(cache, {name: write(name) for name in state.out}, now["tokens"], alive, n + 1, history)


def going(state, given):
    """The rows that have not come to their end; a prompt's last token ends nothing."""
    ended = jnp.isin(state.token, given.ends) & (state.done > 0)
    return state.alive & ~ended & (state.done < given.limits)


def over(mask, x):
    """A mask of the first axes of x, spelt out over the others."""
    return mask.reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim))


def spoken(logits, how, index, keys, wanted, history=None, alternatives=0) -> dict:
    """The next token of every row, and what there is to say of it.

    Args:
      logits: [B, V] of the model.
      how: the sampled distribution.
      index: how many tokens of the completions were drawn before, [B] or a scalar.
      keys: [B] PRNG keys.
      wanted: [B] int32, tokens to take instead of drawing them; -1: draw.
      history: what came before, for the penalties.
      alternatives: k.

    Returns:
      tokens, logps and entropies, each [B]; and, where k is not 0, alternatives and alternative_logps [B, k].
    """
    logits = transform(logits, how, index, history)
    tokens = jnp.where(wanted >= 0, wanted, draw(keys, logits))
    logps = jax.nn.log_softmax(logits)
    entropies = -jnp.sum(jnp.exp(logps) * jnp.where(jnp.isneginf(logps), 0, logps), -1)
    of_token = jnp.take_along_axis(logps, tokens[:, None], 1)[:, 0]
    out = {"tokens": tokens, "logps": of_token, "entropies": entropies}
    if alternatives:
        out["alternative_logps"], out["alternatives"] = jax.lax.top_k(logps, alternatives)
    return out


# ---- the cache


def _chunk(steps: int) -> int:
    """How many steps to scan at a time: about ``CHUNK``, and such that few are wasted in the last."""
    return min(range(min(steps, CHUNK), min(steps, CHUNK) // 2, -1), key=lambda c: -steps % c)


def rooms_of(read: int, whole: int, chunk: int) -> list[int]:
    """Lengths of the cache, one after the other; the steps between two are a multiple of the chunk."""
    rooms, room = [], read
    while room < whole:
        more = max(int(room * (GROWTH - 1)), 64)
        room = min(room + chunk * -(-more // chunk), whole)
        rooms.append(room)
    if len(rooms) > 1 and rooms[-1] - rooms[-2] < 64:  # not worth a program of its own
        rooms.pop(-2)
    return rooms


def cache_of(init_cache, rows, length, *, asked):
    """A cache of ``length`` columns that is made for ``asked`` tokens, however many it has room for now.

    Arrays without numbers say by their shape how many it is made for (``models.cache``).
    """
    made_for = jax.eval_shape(partial(init_cache, rows, asked))
    pick = lambda x, y: jnp.zeros(y.shape, y.dtype) if 0 in y.shape else x
    return jax.tree.map(pick, init_cache(rows, length), made_for)


def shares(program, read) -> bool:
    """Whether rows go on from a cache of their prompt that they share: where there is one, and theirs takes one."""
    cache = jax.eval_shape(partial(program.init_cache, 1, 1)) if program.shared and read else None
    return isinstance(cache, dict) and "prefix" in cache


def behind(apply, prefix):
    """``apply`` of rows that go on from a cache that is not theirs alone, and that nobody writes; or of None."""

    def of_rows(params, tokens, seen, cache):
        logits, cache = apply(params, tokens, seen, cache | {"prefix": prefix})
        return logits, cache | {"prefix": None}

    return apply if prefix is None else of_rows


def check_keep(program, columns):
    """Fails where something is to be kept of prompts of some columns that is not there."""
    if not program.keep:
        return
    length, shared = columns + program.length, shares(program, columns - 1)
    sizes = (1, length), (1, length + 1), (2, length)
    one, *larger = (jax.eval_shape(partial(program.init_cache, *size)) for size in sizes)
    arrays = [name for name in one if 0 not in getattr(one[name], "shape", (0,))] if isinstance(one, dict) else []
    for name in program.keep:
        if name not in arrays:
            raise ValueError(
                f"keep names {name!r}, which is no array of the cache; those are {', '.join(arrays) or 'none'}"
            )
        if shared and [sum(x[name].shape) - sum(one[name].shape) for x in larger] != [1, 1]:
            raise ValueError(f"keep names {name!r}, which has no slot for each token; give shared_prefix=False")


def kept_of(program, cache, prefix, rows, tokens):
    """The leaves to keep, with a slot for each of ``tokens``."""
    as_asked = program.init_cache(rows, tokens)
    cache = cache if prefix is None else _joined(prefix, cache, program)
    return {name: fitted(cache[name], as_asked[name]) for name in program.keep}


def _joined(prefix, cache, program):
    """What is kept of a cache, with what the groups share in front of every row."""
    small, large, tall = (jax.eval_shape(partial(program.init_cache, *of)) for of in ((1, 2), (1, 3), (2, 2)))
    axis = lambda name, other: next(i for i, (a, b) in enumerate(zip(small[name].shape, other[name].shape)) if a != b)
    each = lambda name: jnp.repeat(prefix[name], program.group, axis(name, tall))
    return {name: jnp.concatenate([each(name), cache[name]], axis(name, large)) for name in program.keep}


def fitted(x, into):
    """An array in front of a larger one, or the front of it."""
    x = jax.lax.slice(x, [0] * x.ndim, [min(sizes) for sizes in zip(x.shape, into.shape)])
    return x if x.shape == into.shape else jax.lax.dynamic_update_slice(into, x, [0] * x.ndim)


def repeat_rows(cache, init_cache, group):
    """Every row of the cache ``group`` times."""
    return of_rows(cache, init_cache, lambda x, axis: jnp.repeat(x, group, axis))


def of_rows(cache, init_cache, change):
    """A cache whose arrays have other rows, ``change(x, axis)``; the row axes grow with the number of rows."""
    one, two = jax.eval_shape(lambda: (init_cache(1), init_cache(2)))

    def of_array(x, a, b):
        axis = next((i for i, (m, n) in enumerate(zip(a.shape, b.shape)) if m != n), None)
        return x if axis is None else change(x, axis)

    return jax.tree.map(of_array, cache, one, two)
