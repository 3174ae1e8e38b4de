"""Continuous batching: a row that ends is given the next prompt, inside the one program.

    slots    rows of the cache; each works on one completion at a time
    queue    the prompts, on the device; some of them are read together when enough slots are free for their groups
    ring     all slots write the same column of the cache, and behind the last column comes the first: a prompt that is
             read later is turned to end at the column that is written next, and nothing of the slot's former text is
             left

A step costs what the ring is wide, so the ring is no wider than the longest text in it: where that outgrows it, a wider
one is made, of the lengths of ``decode.rooms_of``. When no prompt is left and few slots are still at work, these go on
alone, in a smaller cache.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pt_jax import checks
from pt_jax.sampling import asked, penalties, rings
from pt_jax.sampling.decode import Completions, blank, cache_of, repeat_rows, rooms_of, row_keys, spoken
from pt_jax.sampling.distribution import NUMBERS, Sampling

CHUNK = 4  # steps between two looks at which slots are free
FEW = 4  # a part of the slots: so few are worth a smaller cache


class _Program(NamedTuple):
    apply: Any
    init_cache: Any
    length: int
    group: int
    entropies: bool
    alternatives: int
    slots: int
    prompts: int  # read together


class _Given(NamedTuple):
    """What may change from call to call; keys, limits and the numbers of ``how`` that are one a row are [J + 1]."""

    prompts: jax.Array
    seen: jax.Array
    keys: jax.Array
    how: Sampling
    ends: jax.Array
    limits: jax.Array


class _State(NamedTuple):
    """``job`` [slots] is a slot's completion, that of sample job % G of prompt job // G; J where it has none."""

    cache: Any
    out: dict[str, jax.Array]  # [J + 1, N, ...] each; the last is written by slots without a job
    job: jax.Array
    begun: jax.Array  # tokens that each slot had read before it drew any
    done: jax.Array  # tokens drawn by each slot
    token: jax.Array  # the last of each, not yet read
    alive: jax.Array
    next: jax.Array  # prompt
    written: jax.Array  # columns of the cache, by all slots together
    history: penalties.History | None


OF_SLOTS = ("job", "begun", "done", "token", "alive", "history")


def sample_queue(
    params, prompts, seen, key, *, apply, init_cache, length, end_tokens, pad_token, slots, group=1, how=None,
    prompt_ids=None, limits=None, entropies=False, alternatives=0, together=None,
) -> Completions:  # fmt: skip
    """Samples ``group`` completions of each of many prompts in a few slots that are never idle for long.

    The completions are those of ``sample``, token for token: they come from the same keys, fold_in(fold_in(fold_in(key,
    p), j), n). Where their lengths differ much, less time is spent on rows that have ended.

    Args:
      params, prompts, seen, key, apply, length, end_tokens, pad_token, group, how, prompt_ids, limits, entropies,
        alternatives: as ``sample``.
      init_cache: as ``sample``. An axis of its arrays that grows with the rows, and one that grows with the length,
        are a row's and a token's; token n is written to column n mod their number, and a model must see what is in a
        column by what the column says of itself, not by its place, as ``models.init_cache`` does.
      slots: how many completions are worked on at a time; at least ``group``.
      together: how many prompts are read together; an eighth of what the slots hold when None.

    Returns:
      ``Completions`` of P * G rows in the order of the prompts.

    Raises:
      ValueError: as ``sample``; or there are fewer slots than a group needs.
    """
    size = checks.shapes(prompts=(prompts, "P T"), seen=(seen, "P T"))
    for name, number in (("length", length), ("group", group), ("slots", slots)):
        checks.positive(name, number)
    checks.between("alternatives", alternatives, 0, np.inf)
    asked.check_prompts(seen)
    if slots < group:
        raise ValueError(f"slots={slots} cannot hold the {group} completions of a prompt; give at least group")
    together = max(slots // (8 * group), 1) if together is None else together
    if not 1 <= together <= slots // group:
        raise ValueError(f"together={together} prompts of {group} completions do not fit {slots} slots")
    rows = size["P"] * group
    of_rows = (Sampling() if how is None else how).check().of_rows(rows)
    all_limits = asked.limits_of(limits, rows, length)
    program = _Program(apply, init_cache, length, group, entropies, alternatives, slots, together)
    asked.check(program, params, prompts, seen, how=how, end_tokens=end_tokens, limits=limits)
    keys = row_keys(key, jnp.arange(size["P"]) if prompt_ids is None else jnp.asarray(prompt_ids), group)
    # a last job, of slots without one
    more = lambda x: jnp.concatenate([x, x[:1]])
    given = _Given(
        jnp.asarray(prompts), jnp.asarray(seen), more(keys), _numbers_of_rows(of_rows, more),
        jnp.asarray(tuple(end_tokens), jnp.int32), more(all_limits),
    )  # fmt: skip
    return _sample(program, params, given, jnp.asarray(pad_token, jnp.int32))


@partial(jax.jit, static_argnums=0)
def _sample(program, params, given, pad) -> Completions:
    read, jobs, few = given.prompts.shape[1] - 1, len(given.keys) - 1, program.slots // FEW
    columns = read + program.length
    sized = partial(cache_of, program.init_cache, asked=columns + 1)
    state = _idle(program, params, given, pad, sized)
    refill, step = (partial(f, program, params, given) for f in (_refilled, _stepped))
    steps = lambda state: jax.lax.scan(lambda state, _: (step(state), None), state, length=CHUNK)[0]

    def work(room, state):
        fresh = partial(sized, length=room)
        return steps(jax.lax.while_loop(partial(_can_refill, program, given), partial(refill, fresh=fresh), state))

    def goes_on(room, state):
        fits = jnp.where(state.alive, state.begun + state.done, 0).max() + CHUNK <= room
        busy = (state.next < len(given.prompts)) | (state.alive.sum() > few)
        return busy & fits if room < columns else busy

    rooms = rooms_of(read, columns, CHUNK)
    for room in rooms:
        larger = sized(program.slots, room)
        state = state._replace(cache=rings.widened(state.cache, larger, program.init_cache, state.written))
        state = jax.lax.while_loop(partial(goes_on, room), partial(work, room), state)
    if few:
        state = jax.lax.while_loop(lambda state: state.alive.any(), steps, _at_work(program, state, few))
    out = {name: x[:jobs] for name, x in state.out.items()}
    return Completions(**out, ended=(out["alive"] & jnp.isin(out["tokens"], given.ends)).any(-1))


def _idle(program, params, given, pad, sized):
    """Slots without a job."""
    slots, jobs = program.slots, len(given.keys) - 1
    vocab = asked.vocabulary(program, params) if penalties.asks(given.how) else None
    none = jnp.zeros(slots, jnp.int32)
    return _State(
        cache=sized(slots, 0), out=blank((jobs + 1, program.length), pad, program), job=none + jobs, begun=none,
        done=none, token=none, alive=jnp.zeros(slots, bool), next=jnp.int32(0), written=jnp.int32(0),
        history=penalties.empty(given.how, slots, vocab),
    )  # fmt: skip


def _stepped(program, params, given, state):
    """Reads the last token of every slot and draws the next."""
    logits, cache = program.apply(params, state.token[:, None], state.alive[:, None], state.cache)
    keys = jax.vmap(jax.random.fold_in)(given.keys[state.job], state.done)
    how, to_draw = _numbers_of_rows(given.how, lambda x: x[state.job]), jnp.full_like(state.token, -1)
    now = spoken(logits[:, 0], how, state.done, keys, to_draw, state.history, program.alternatives)
    now["alive"] = state.alive
    at = (jnp.where(state.alive, state.job, len(given.keys) - 1), state.done)
    out = {name: x.at[at].set(now[name], mode="drop") for name, x in state.out.items()}
    done = state.done + state.alive
    alive = state.alive & ~jnp.isin(now["tokens"], given.ends) & (done < given.limits[state.job])
    token, seen = now["tokens"][:, None], state.alive[:, None]
    return state._replace(
        cache=cache, out=out, done=done, token=now["tokens"], alive=alive, written=state.written + 1,
        history=penalties.after(state.history, token, seen, seen),
    )  # fmt: skip


def _numbers_of_rows(how, change):
    """``how`` with other numbers where there is one a row."""
    numbers = {name: x for name in NUMBERS if (x := getattr(how, name)) is not None and jnp.ndim(x)}
    return how.replace(**{name: change(x) for name, x in numbers.items()})


def _can_refill(program, given, state):
    free = (~state.alive).sum() >= program.prompts * program.group
    return (state.next < len(given.prompts)) & free


def _refilled(program, params, given, state, *, fresh):
    """The next prompts, in slots that are free: all of them is read but their last tokens."""
    (P, T), G = given.prompts.shape, program.group
    which = state.next + jnp.arange(program.prompts)
    prompts, seen = (x[jnp.minimum(which, P - 1)] for x in (given.prompts, given.seen))
    rows = jnp.argsort(state.alive, stable=True)[: program.prompts * G]  # those that are free come first
    rows = jnp.where(jnp.repeat(which < P, G), rows, program.slots)  # out of range: dropped
    sized = partial(cache_of, program.init_cache, asked=T + program.length)
    cache = sized(program.prompts, T - 1)
    if T > 1:
        cache = program.apply(params, prompts[:, :-1], seen[:, :-1], cache)[1]
    cache = repeat_rows(cache, lambda n: sized(n, T - 1), G)
    cache = rings.inserted(state.cache, cache, fresh(len(rows)), rows, program.init_cache, state.written - (T - 1))
    put = lambda x, new: x.at[rows].set(new, mode="drop")
    history = penalties.of_prompts(given.how, prompts, seen, _known_tokens(state.history), G)
    return state._replace(
        cache=cache, job=put(state.job, (which[:, None] * G + jnp.arange(G)[None]).reshape(-1)),
        begun=put(state.begun, jnp.repeat(seen.sum(1, dtype=jnp.int32) - 1, G)), done=put(state.done, 0),
        token=put(state.token, jnp.repeat(prompts[:, -1], G)), alive=put(state.alive, True),
        next=state.next + program.prompts, history=jax.tree.map(put, state.history, history),
    )  # fmt: skip


def _known_tokens(history):
    return None if history is None else jax.tree.leaves(history)[0].shape[-1]


def _at_work(program, state, few):
    """The slots that still work, of which there are no more than ``few``."""
    slots = jnp.argsort(~state.alive, stable=True)[:few]
    of_slots = jax.tree.map(lambda x: x[slots], {name: getattr(state, name) for name in OF_SLOTS})
    return state._replace(cache=rings.taken(state.cache, slots, program.init_cache), **of_slots)
