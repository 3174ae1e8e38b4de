"""Continuous batching: a row that ends is given the next completion, inside the one program.

    slots    rows of a cache; each works on one completion at a time
    queue    the prompts, on the device, in the order in which their completions are begun
    pool     the cache of the prompts that were read last: some are read together, each once for all of its group, and
             a slot that begins a completion gets a copy
    ring     all slots of a cache write the same column, and behind the last column comes the first: what is copied
             into a slot is turned to end at the column that is written next, and nothing of its former text is left
    lanes    slots of different widths. A step costs what its ring is wide, so completions begin in a narrow one, and
             those that outgrow it go on in the next, which is twice as wide and has fewer slots. One lane steps at a
             time: the first that can, while texts that outgrow it find room in the next; then the next, until it has
             room again, or until nothing is left before it

When few slots of the last lane are still at work, these go on alone, in a smaller cache.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pt_jax.sampling import asked, lanes, penalties, rings
from pt_jax.sampling.decode import Completions, blank, cache_of, check_keep, read_prompts, row_keys, spoken
from pt_jax.sampling.distribution import NUMBERS, Sampling
from pt_jax.sampling.lanes import Lane

FEW = 4  # a part of the last lane's slots: so few are worth a smaller cache


class _Program(NamedTuple):
    apply: Any
    init_cache: Any
    length: int
    group: int
    entropies: bool
    keep: tuple[str, ...]
    alternatives: int
    slots: int
    prompts: int  # read together
    shared = False  # each slot has a copy of its prompt


class _Given(NamedTuple):
    """What may change from call to call. Keys, limits, forced and the numbers of ``how`` that are one a row are of J
    completions and one more, which is that of slots without one."""

    prompts: jax.Array
    seen: jax.Array
    keys: jax.Array
    how: Sampling
    ends: jax.Array
    limits: jax.Array
    forced: jax.Array


class _State(NamedTuple):
    lanes: tuple[Lane, ...]
    pool: Any
    out: dict[str, jax.Array]  # [J + 1, N, ...] each; the last is written by slots without a job
    kept: dict[str, jax.Array]  # [J + 1, T + N, ...] each
    next: jax.Array  # job
    upto: jax.Array  # prompts read so far

    def with_lane(self, at, lane):
        return self._replace(lanes=(*self.lanes[:at], lane, *self.lanes[at + 1 :]))


def sample_queue(
    params, prompts, seen, key, *, apply, init_cache, length, end_tokens, pad_token, slots, group=1, how=None,
    prompt_ids=None, limits=None, forced=None, entropies=False, keep=(), alternatives=0, until=None, together=None,
) -> Completions:  # fmt: skip
    """Samples ``group`` completions of each of many prompts in a few slots that are never idle for long.

    The completions are those of ``sample``, token for token: they come from the same keys, fold_in(fold_in(fold_in(key,
    p), j), n). Where a number drawn lies on the edge between two tokens, to float32's rounding, the other may come:
    of 4,169 tokens of a vocabulary of 4,096 one was, 1e-8 off. Where lengths differ much, less time is spent on rows
    that have ended, and on attending to columns that only long ones need. Each slot has a copy of its prompt, so
    memory is that of the slots however many rows there are; where prompts are long and lengths much the same,
    ``sample``, whose groups share one, is faster.

    Args:
      params, prompts, seen, key, apply, length, end_tokens, pad_token, group, how, prompt_ids, limits, forced,
        entropies, keep, alternatives: as ``sample``. What is kept must have a slot for each token of each row.
      init_cache: as ``sample``. An axis of its arrays that grows with the rows, and one that grows with the length,
        are a row's and a token's; token n is written to column n mod their number, and a model must see what is in a
        column by what the column says of itself, not by its place, as ``models.init_cache`` does.
      slots: how many completions are worked on at a time, at most, while they are short. For those that become long
        there are half as many slots, and then a quarter, each twice as wide as the last, but for the widest.
      until: None. Nothing outside of the program sees a token before the last is drawn, so nothing can stop a row by
        its text; ``sample_until`` can.
      together: how many prompts are read together, at most; a quarter as many as there are slots when None.

    Returns:
      ``Completions`` of P * G rows in the order of the prompts.

    Raises:
      ValueError: as ``sample``; or ``until`` is given.
    """
    asked.functions(apply=apply, init_cache=init_cache)
    asked.counts(length=length, group=group, slots=slots)
    together = max(slots // 4, 1) if together is None else together
    asked.counts(together=together)
    asked.check_alternatives(alternatives)
    P = asked.check_prompts(prompts, seen)
    if until is not None:
        raise ValueError("until looks at tokens between two programs, and a queue is one; give it to sample_until")
    rows = P * group
    key, of_rows, ends = asked.key_of(key, rows), asked.how_of(how, rows), asked.ends_of(end_tokens)
    all_limits, all_forced = asked.limits_of(limits, rows, length), asked.forced_of(forced, rows, length).T
    reads = -(-P // together)
    program = _Program(
        apply, init_cache, length, group, entropies, asked.names("keep", keep), alternatives, min(slots, rows),
        prompts=-(-P // reads),
    )  # fmt: skip
    _check_keep(program, prompts.shape[1])
    asked.check(
        program, params, prompts, seen, how=how, end_tokens=end_tokens, pad_token=pad_token, limits=limits,
        forced=forced,
    )  # fmt: skip
    keys = row_keys(key, asked.ids_of(prompt_ids, P, key), group)
    more = lambda x: jnp.concatenate([x, x[:1]])
    given = _Given(
        jnp.asarray(prompts), jnp.asarray(seen), more(keys), _numbers_of_rows(of_rows, more), ends, more(all_limits),
        more(all_forced),
    )  # fmt: skip
    return _sample(program, params, given, asked.pad_of(pad_token))


def _check_keep(program, columns):
    check_keep(program, columns)
    rows, columns = rings.axes(program.init_cache)
    for name in program.keep:
        if rows[name] < 0 or columns[name] < 0:
            raise ValueError(f"keep names {name!r}, which has no slot for each token of each row; use sample")


@partial(jax.jit, static_argnums=0)
def _sample(program, params, given, pad) -> Completions:
    read, jobs = given.prompts.shape[1] - 1, len(given.keys) - 1
    rooms = lanes.rooms_of(read, read + program.length)
    sized = partial(cache_of, program.init_cache, asked=read + 1 + program.length)
    state = _idle(program, params, given, pad, sized, rooms)
    last, few = len(rooms) - 1, len(state.lanes[-1].alive) // FEW
    can_refill = lambda state: (state.next < jobs) & ~state.lanes[0].alive.all()
    refill = partial(_refilled, program, params, given, sized=sized, room=rooms[0])

    def steps(at, state):
        step = lambda state, _: (_stepped(program, params, given, at, state), None)
        return jax.lax.scan(step, state, length=lanes.CHUNK)[0]

    def work(at, state):
        return steps(at, state if at else jax.lax.while_loop(can_refill, refill, state))

    def comes(at, state):  # whether the lanes before may have something for this one
        return sum((lane.alive.sum() for lane in state.lanes[:at]), jobs - state.next) > 0

    def goes_on(at, state):
        lane, before = state.lanes[at], comes(at, state)
        goes = before | (lane.alive.sum() > (few if at == last else 0))
        if at:
            goes &= ~before | (lane.alive.all() & lanes.outgrown(state.lanes[at - 1], rooms[at - 1]).any())
        return goes if at == last else goes & ~lanes.outgrown(lane, rooms[at]).any()

    def turn(state):
        for at in range(last + 1):
            state = jax.lax.while_loop(partial(goes_on, at), partial(work, at), state)
            if at < last:
                state = jax.lax.while_loop(
                    partial(_can_move, rooms, at), partial(_moved, program, sized, rooms, at), state
                )
        return state

    state = jax.lax.while_loop(lambda state: comes(last, state) | (state.lanes[-1].alive.sum() > few), turn, state)
    if few:
        state = state.with_lane(last, lanes.at_work(program.init_cache, state.lanes[-1], few))
        state = jax.lax.while_loop(lambda state: state.lanes[-1].alive.any(), partial(steps, last), state)
    out = {name: x[:jobs] for name, x in state.out.items()}
    kept = {name: jnp.moveaxis(x[:jobs], (0, 1), at) for name, x, at in _kept(program, state.kept)}
    ended = (out["alive"] & jnp.isin(out["tokens"], given.ends)).any(-1)
    return Completions(**out, ended=ended, kept=kept)


def _idle(program, params, given, pad, sized, rooms):
    """Lanes without a job."""
    T, slots, jobs = given.prompts.shape[1], program.slots, len(given.keys) - 1
    vocab = asked.vocabulary(program, params) if penalties.asks(given.how) else None

    def lane(slots, room):
        none = jnp.zeros(slots, jnp.int32)
        return Lane(
            cache=sized(slots, room), written=jnp.int32(0), job=none + jobs, begun=none, done=none, token=none,
            alive=jnp.zeros(slots, bool), history=penalties.empty(given.how, slots, vocab),
        )  # fmt: skip

    empty = program.init_cache(jobs + 1, T + program.length) if program.keep else {}
    return _State(
        lanes=tuple(map(lane, lanes.slots_of(slots, len(rooms)), rooms)),
        pool=sized(program.prompts, T - 1), out=blank((jobs + 1, program.length), pad, program),
        kept={name: jnp.moveaxis(x, at, (0, 1)) for name, x, at in _kept(program, empty)}, next=jnp.int32(0),
        upto=jnp.int32(0),
    )  # fmt: skip


def _kept(program, cache):
    """What is kept of a cache: names, arrays, and their axes of rows and columns."""
    rows, columns = rings.axes(program.init_cache)
    return [(name, cache[name], (rows[name], columns[name])) for name in program.keep]


def _stepped(program, params, given, at, state):
    """Reads the last token of every slot of a lane and draws the next."""
    lane, none = state.lanes[at], len(given.keys) - 1
    logits, cache = program.apply(params, lane.token[:, None], lane.alive[:, None], lane.cache)
    keys = jax.vmap(jax.random.fold_in)(given.keys[lane.job], lane.done)
    how = _numbers_of_rows(given.how, lambda x: x[lane.job])
    wanted = given.forced[lane.job, jnp.minimum(lane.done, program.length - 1)]
    now = spoken(logits[:, 0], how, lane.done, keys, wanted, lane.history, program.alternatives)
    now["alive"] = lane.alive
    job = jnp.where(lane.alive, lane.job, none)
    out = {name: x.at[job, lane.done].set(now[name], mode="drop") for name, x in state.out.items()}
    kept = dict(state.kept)
    for name, x, (of_rows, of_columns) in _kept(program, cache):
        column = jax.lax.dynamic_slice_in_dim(x, lane.written % x.shape[of_columns], 1, of_columns)
        column = jnp.moveaxis(column, (of_rows, of_columns), (0, 1))[:, 0]
        kept[name] = kept[name].at[job, given.prompts.shape[1] - 1 + lane.done].set(column, mode="drop")
    done = lane.done + lane.alive
    alive = lane.alive & ~jnp.isin(now["tokens"], given.ends) & (done < given.limits[lane.job])
    token, seen = now["tokens"][:, None], lane.alive[:, None]
    lane = lane._replace(
        cache=cache, written=lane.written + 1, done=done, token=now["tokens"], alive=alive,
        history=penalties.after(lane.history, token, seen, seen),
    )  # fmt: skip
    return state.with_lane(at, lane)._replace(out=out, kept=kept)


def _numbers_of_rows(how, change):
    """``how`` with other numbers where there is one a row."""
    numbers = {name: x for name in NUMBERS if (x := getattr(how, name)) is not None and jnp.ndim(x)}
    return how.replace(**{name: change(x) for name, x in numbers.items()})


def _refilled(program, params, given, state, *, sized, room):
    """The next completions in free slots of the first lane, as many as are filled at a time and are in the pool.

    All of a prompt is in the pool but its last token.
    """
    (P, T), G, jobs = given.prompts.shape, program.group, len(given.keys) - 1
    state = _with_prompts(program, params, given, state, sized)
    lane = state.lanes[0]
    rows = lanes.some(~lane.alive)
    job = state.next + jnp.arange(len(rows))
    begins = ~lane.alive[rows] & (job < jnp.minimum(state.upto * G, jobs))
    which = jnp.minimum(job // G, P - 1)
    cache = rings.taken(state.pool, which - (state.upto - program.prompts), program.init_cache)
    prompts, seen = given.prompts[which], given.seen[which]
    none = jnp.zeros(len(rows), jnp.int32)
    history = penalties.of_prompts(given.how, prompts, seen, _known_tokens(lane.history), 1)
    new = Lane(cache, none, job, seen.sum(1, dtype=jnp.int32) - 1, none, prompts[:, -1], begins, history)
    kept = dict(state.kept)
    for name, x, at in _kept(program, cache):
        columns = jnp.where(begins, job, jobs + 1)[:, None], jnp.arange(T - 1)[None]  # out of range: dropped
        kept[name] = kept[name].at[columns].set(jnp.moveaxis(x, at, (0, 1)), mode="drop")
    lane = lanes.filled(program.init_cache, lane, new, sized(len(rows), room), rows, lane.written - (T - 1))
    return state.with_lane(0, lane)._replace(kept=kept, next=state.next + begins.sum(dtype=jnp.int32))


def _with_prompts(program, params, given, state, sized):
    """The prompt of the next completion in the pool, and those behind it."""

    def read(state):
        which = jnp.minimum(state.upto + jnp.arange(program.prompts), len(given.prompts) - 1)
        pool = read_prompts(program, params, given.prompts[which], given.seen[which], sized)
        return state._replace(pool=pool, upto=state.upto + program.prompts)

    return jax.lax.while_loop(lambda state: state.upto * program.group <= state.next, read, state)


def _known_tokens(history):
    return None if history is None else jax.tree.leaves(history)[0].shape[-1]


def _can_move(rooms, at, state):
    """Whether a text that outgrows a lane finds room in the next."""
    return lanes.outgrown(state.lanes[at], rooms[at]).any() & ~state.lanes[at + 1].alive.all()


def _moved(program, sized, rooms, at, state):
    """Some of those that outgrow a lane in the next."""
    lane, into = state.lanes[at : at + 2]
    to = lanes.some(~into.alive)
    outgrown = lanes.outgrown(lane, rooms[at])
    lane, into = lanes.moved(program.init_cache, lane, into, sized(len(to), rooms[at + 1]), outgrown, to)
    return state.with_lane(at, lane).with_lane(at + 1, into)
