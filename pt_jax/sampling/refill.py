"""Continuous batching: a row that ends is given the next prompt, inside the one program.

    slots    rows of the cache; each works on one completion at a time
    queue    the prompts, on the device; some of them are read together when enough slots are free for their groups

All slots write the same column of the cache, which is a ring: a prompt that is read later is turned to end at the
column that is written next, and nothing of the slot's former text is left. A completion needs at most as many columns
as the ring has.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pt_jax import checks
from pt_jax.sampling import decode, penalties
from pt_jax.sampling.decode import Completions, cache_of, check_prompts, repeat_rows, row_keys, spoken, vocabulary
from pt_jax.sampling.distribution import Sampling

CHUNK = 4  # steps between two looks at which slots are free


class _Program(NamedTuple):
    apply: Any
    init_cache: Any
    length: int
    group: int
    slots: int
    prompts: int  # read together


class _State(NamedTuple):
    """``job`` [slots] is a slot's completion, that of sample job % G of prompt job // G; J where it has none."""

    cache: Any
    out: dict[str, jax.Array]  # [J + 1, N] each; the last is written by slots without a job
    job: jax.Array
    done: jax.Array  # tokens drawn by each slot
    token: jax.Array  # the last of each, not yet read
    alive: jax.Array
    next: jax.Array  # prompt
    written: jax.Array  # columns of the cache, by all slots together
    history: penalties.History | None


def sample_queue(
    params, prompts, seen, key, *, apply, init_cache, length, end_tokens, pad_token, slots, group=1, how=None,
    prompt_ids=None, together=None,
) -> Completions:  # fmt: skip
    """Samples ``group`` completions of each of many prompts in a few slots that are never idle for long.

    The completions are those of ``sample``, token for token: they come from the same keys, fold_in(fold_in(fold_in(key,
    p), j), n). Where their lengths differ much, less time is spent on rows that have ended.

    Args:
      params, prompts, seen, key, apply, length, end_tokens, pad_token, group, how, prompt_ids: as ``sample``; ``how``
        with numbers, not one a row.
      init_cache: as ``sample``. An axis of its arrays that grows with the rows, and one that grows with the length,
        are a row's and a token's; a model must see what is in a column by what the column says of itself, not by its
        place, as ``models.init_cache`` does.
      slots: how many completions are worked on at a time; at least ``group``.
      together: how many prompts are read together; a quarter of what the slots hold when None.

    Returns:
      ``Completions`` of P * G rows in the order of the prompts.

    Raises:
      ValueError: as ``sample``; or there are fewer slots than a group needs.
    """
    size = checks.shapes(prompts=(prompts, "P T"), seen=(seen, "P T"))
    for name, number in (("length", length), ("group", group), ("slots", slots)):
        checks.positive(name, number)
    check_prompts(seen)
    if slots < group:
        raise ValueError(f"slots={slots} cannot hold the {group} completions of a prompt; give at least group")
    together = max(slots // (4 * group), 1) if together is None else together
    if not 1 <= together <= slots // group:
        raise ValueError(f"together={together} prompts of {group} completions do not fit {slots} slots")
    how = (Sampling() if how is None else how).check()
    ids = jnp.arange(size["P"]) if prompt_ids is None else jnp.asarray(prompt_ids)
    keys = row_keys(key, ids, group)
    ends, pad = jnp.asarray(tuple(end_tokens), jnp.int32), jnp.asarray(pad_token, jnp.int32)
    program = _Program(apply, init_cache, length, group, slots, together)
    return _sample(program, params, prompts, seen, keys, how, ends, pad)


@partial(jax.jit, static_argnums=0)
def _sample(program, params, prompts, seen, keys, how, ends, pad) -> Completions:
    P, jobs, slots = len(prompts), len(keys), program.slots
    read = prompts.shape[1] - 1
    columns = read + program.length
    sized = partial(cache_of, program.init_cache, asked=columns + 1)
    keys = jnp.concatenate([keys, keys[:1]])  # of slots without a job
    names = {"tokens": pad, "logps": jnp.float32(0), "alive": jnp.bool_(False)}
    state = _State(
        cache=sized(slots, columns),
        out={name: jnp.full((jobs + 1, program.length), x) for name, x in names.items()},
        job=jnp.full(slots, jobs), done=jnp.zeros(slots, jnp.int32), token=jnp.zeros(slots, jnp.int32),
        alive=jnp.zeros(slots, bool), next=jnp.int32(0), written=jnp.int32(0), history=None,
    )  # fmt: skip
    vocab = vocabulary(program, params, how, state.cache, slots)
    state = state._replace(history=penalties.empty(how, slots, vocab))

    def step(state, _):
        """Reads the last token of every slot and draws the next."""
        logits, cache = program.apply(params, state.token[:, None], state.alive[:, None], state.cache)
        of_row = jax.vmap(jax.random.fold_in)(keys[state.job], state.done)
        now = spoken(logits[:, 0], how, state.done, of_row, jnp.full(slots, -1, jnp.int32), state.history)
        now["alive"] = state.alive
        at = (jnp.where(state.alive, state.job, jobs), state.done)
        out = {name: x.at[at].set(now[name], mode="drop") for name, x in state.out.items()}
        done = state.done + state.alive
        alive = state.alive & ~jnp.isin(now["tokens"], ends) & (done < program.length)
        drawn = now["tokens"][:, None], state.alive[:, None], state.alive[:, None]
        history = penalties.after(state.history, *drawn)
        return _State(cache, out, state.job, done, now["tokens"], alive, state.next, state.written + 1, history), None

    def refill(state):
        """The next prompts, in slots that are free: all of them is read but their last tokens."""
        which = state.next + jnp.arange(program.prompts)
        given = jnp.minimum(which, P - 1)
        count = program.prompts * program.group
        rows = jnp.argsort(state.alive, stable=True)[:count]  # those that are free come first
        rows = jnp.where(jnp.repeat(which < P, program.group), rows, slots)  # out of range: dropped
        cache = sized(count, read)
        if read:
            text = prompts[given, :-1], seen[given, :-1]
            _, cache = program.apply(params, *text, sized(program.prompts, read))
            cache = repeat_rows(cache, lambda n: sized(n, read), program.group)
        cache = _inserted(state.cache, cache, rows, sized, columns, state.written - read)
        job = (which[:, None] * program.group + jnp.arange(program.group)[None]).reshape(-1)
        put = lambda x, new: x.at[rows].set(new, mode="drop")
        history = penalties.of_prompts(how, prompts[given], seen[given], vocab, program.group)
        return state._replace(
            cache=cache, job=put(state.job, job), done=put(state.done, 0), alive=put(state.alive, True),
            token=put(state.token, jnp.repeat(prompts[given, -1], program.group)), next=state.next + program.prompts,
            history=jax.tree.map(put, state.history, history),
        )  # fmt: skip

    def can_refill(state):
        return (state.next < P) & ((~state.alive).sum() >= program.prompts * program.group)

    def work(state):
        state = jax.lax.while_loop(can_refill, refill, state)
        return jax.lax.scan(step, state, length=CHUNK)[0]

    state = jax.lax.while_loop(lambda state: (state.next < P) | state.alive.any(), work, state)
    out = {name: x[:jobs] for name, x in state.out.items()}
    return Completions(**out, ended=(out["alive"] & jnp.isin(out["tokens"], ends)).any(-1))


def _inserted(cache, new, rows, init_cache, columns, turn):
    """A cache whose ``rows`` hold other texts.

    Args:
      cache: of all slots, with ``columns`` columns.
      new: of some rows, with as many columns as they have read.
      rows: [R] the slots to put them in.
      init_cache, columns: see above.
      turn: how many columns further on the first of them goes to; behind the last comes column 0, of a shorter ring
        (``models.cache``) too.
    """
    one, more = (jax.eval_shape(partial(init_cache, len(rows) + n, columns)) for n in (0, 1))
    small = jax.eval_shape(partial(init_cache, len(rows), 0))
    differs = lambda a, b: next((i for i, (m, n) in enumerate(zip(a.shape, b.shape)) if m != n), None)

    def insert(old, new, fresh, one, more, small):
        of_rows, of_tokens = differs(one, more), differs(one, small)
        if of_rows is None:
            return old
        if of_tokens is not None:
            new = jnp.roll(decode.fitted(new, fresh), turn % fresh.shape[of_tokens], of_tokens)
        return old.at[(slice(None),) * of_rows + (rows,)].set(new, mode="drop")

    return jax.tree.map(insert, cache, new, init_cache(len(rows), columns), one, more, small)
