"""Speculative decoding: guess some tokens ahead, read them all at once, and keep those that would have been drawn.

Leviathan et al. 2022, https://arxiv.org/abs/2211.17192, accept a guess at random, such that the distribution stays.
Here the token at each position is drawn with that position's own key, from the model's own distribution, as ``sample``
draws it, and a guess is right when it is that token. So not only the distribution but each sample is that of
``sample``, whatever is guessed. A draft model guesses with the same keys: where it agrees with the model, it draws the
same token.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pt_jax.models import cache as caches
from pt_jax.sampling import asked, decode, penalties
from pt_jax.sampling.decode import Completions
from pt_jax.sampling.distribution import NUMBERS, draw, transform


class Draft(NamedTuple):
    """A smaller model with the same tokens, to guess with: its params, ``apply`` and ``init_cache`` as ``sample``'s."""

    params: Any
    apply: Any
    init_cache: Any


class _Program(NamedTuple):
    apply: Any
    init_cache: Any
    of_draft: tuple | None  # apply, init_cache
    forget: Any
    length: int
    group: int
    ahead: int
    match: int
    shared: bool


class _Model(NamedTuple):
    """What reads for rows with a cache each, of which ``group`` after each other go on from one of ``prefix``."""

    apply: Any
    params: Any
    prefix: Any  # [P, ...], or None
    group: int


class _State(NamedTuple):
    """Of every row: ``done`` tokens are drawn, and the last, ``token``, is not yet read."""

    cache: Any
    draft: Any
    text: jax.Array  # [B, T + N + K + 1], the prompt and what was drawn
    logps: jax.Array  # [B, N + K + 1]
    history: penalties.History | None
    token: jax.Array
    alive: jax.Array
    done: jax.Array
    reads: jax.Array


def speculate(
    params, prompts, seen, key, *, apply, init_cache, length, end_tokens, pad_token, group=1, how=None, prompt_ids=None,
    limits=None, draft: Draft | None = None, ahead=4, match=3, forget=caches.forget, shared_prefix=True,
):  # fmt: skip
    """``sample`` in fewer, wider readings of the model: worth it where its weights take longer to load than to use.

    Without a draft model the guess is what followed when the last few tokens stood in the text before (prompt look-up,
    Saxena 2023): good where answers repeat their prompts.

    Args:
      params, prompts, seen, key, apply, init_cache, length, end_tokens, pad_token, group, how, prompt_ids, limits,
        shared_prefix: as ``sample``. Each row has a cache of its own, ``init_cache(1, columns)``.
      draft: a model to guess with; or None.
      ahead: K, how many tokens are guessed at a time.
      match: of prompt look-up, how many of the last tokens are compared at most; the longest match is taken, and of
        equals the latest.
      forget: ``(cache, columns) -> cache`` without the last columns, for model and draft; never of a prompt's. Unless
        it is given, the caches are those of ``models.init_cache``.

    Returns:
      ``Completions`` of P * G rows, those of ``sample``; and how often each row was read after its prompt, [P * G].

    Raises:
      ValueError: as ``sample``; ahead or match is below 1; or the draft is none, or has another vocabulary; or a cache
        is not known to ``forget``.
    """
    asked.counts(ahead=ahead, match=match)
    asked.functions(apply=apply, init_cache=init_cache, forget=forget)
    if not isinstance(draft, Draft | None):
        raise ValueError(f"draft must be a Draft(params, apply, init_cache), got {type(draft).__name__}")
    if draft is not None:
        asked.functions(**{"draft.apply": draft.apply, "draft.init_cache": draft.init_cache})
    if forget is caches.forget:
        for make in (init_cache,) if draft is None else (init_cache, draft.init_cache):
            caches.check_forgetting(jax.eval_shape(partial(make, 1, 1)), ahead, "ahead")
    program, given = decode.prepared(
        prompts, seen, key, apply=apply, init_cache=init_cache, length=length, end_tokens=end_tokens,
        pad_token=pad_token, group=group, how=how, prompt_ids=prompt_ids, limits=limits, shared_prefix=shared_prefix,
    )  # fmt: skip
    asked.check(program, params, prompts, seen, how=how, end_tokens=end_tokens, pad_token=pad_token, limits=limits)
    if draft is not None:
        mine, theirs = asked.vocabulary(program, params), asked.vocabulary(draft, draft.params)
        if mine != theirs:
            raise ValueError(f"draft knows {theirs} tokens and the model {mine}; they must have the same vocabulary")
    numbers = {name: getattr(given.how, name) for name in NUMBERS}
    of_rows = {name: x[:, :, None] for name, x in numbers.items() if x is not None and jnp.ndim(x)}
    given = given._replace(how=given.how.replace(**of_rows))
    of_draft = None if draft is None else (draft.apply, draft.init_cache)
    program = _Program(apply, init_cache, of_draft, forget, length, group, ahead, match, program.shared)
    return _speculate(program, params, None if draft is None else draft.params, prompts, seen, given)


@partial(jax.jit, static_argnums=0)
def _speculate(program, params, draft_params, prompts, seen, given):
    (P, T), N, K = prompts.shape, program.length, program.ahead
    rows = P * program.group
    repeat = partial(jnp.repeat, repeats=program.group, axis=0)
    model, cache = _begun(program, program.apply, program.init_cache, params, prompts, seen)
    draft, of_draft = None, None
    if program.of_draft:
        draft, of_draft = _begun(program, *program.of_draft, draft_params, prompts, seen)
    vocab = asked.vocabulary(program, params) if penalties.asks(given.how) else None
    state = _State(
        cache=cache, draft=of_draft,
        text=jnp.pad(repeat(prompts), ((0, 0), (0, N + K + 1))), logps=jnp.zeros((rows, N + K + 1)),
        history=penalties.of_prompts(given.how, prompts, seen, vocab, program.group), token=repeat(prompts[:, -1]),
        alive=jnp.ones(rows, bool), done=jnp.zeros(rows, jnp.int32), reads=jnp.zeros(rows, jnp.int32),
    )  # fmt: skip
    keys = decode.row_keys(given.key, given.ids, program.group)
    first = T - repeat(seen.sum(1))
    state = jax.lax.while_loop(
        lambda state: state.alive.any(),
        lambda state: _step(program, model, draft, given, keys, first, T, state),
        state,
    )
    alive = jnp.arange(N)[None] < state.done[:, None]
    tokens = jnp.where(alive, state.text[:, T : T + N], given.pad)
    ended = (alive & jnp.isin(tokens, given.ends)).any(-1)
    return Completions(tokens, jnp.where(alive, state.logps[:, :N], 0), alive, ended), state.reads


def _begun(program, apply, init_cache, params, prompts, seen):
    """A model, and the caches of rows [B, ...] that have read their prompts or have them in front."""
    T, N, K = prompts.shape[1], program.length, program.ahead
    one = partial(decode.cache_of, init_cache, 1, asked=T + N)
    program = program._replace(apply=apply, init_cache=init_cache)
    read = lambda *text: decode.read_prompts(program, params, *(x[None] for x in text), lambda _, length: one(length))
    cache = jax.vmap(read)(prompts, seen)
    many = lambda tree: jax.tree.map(lambda x: jnp.repeat(x, program.group, 0), tree)
    if decode.shares(program, T - 1):
        own = jax.vmap(lambda _: one(N + K))(jnp.arange(len(prompts)))
        return _Model(apply, params, cache, program.group), many(own)
    whole = jax.vmap(lambda cache: jax.tree.map(decode.fitted, cache, one(T + N + K)))(cache)
    return _Model(apply, params, None, 1), many(whole)


def _read(model, tokens, seen, cache):
    """Rows with a cache each: logits [B, T, V] and caches."""
    rows, group = len(tokens), model.group

    def of_row(prefix, tokens, seen, cache):
        logits, cache = decode.behind(model.apply, prefix)(model.params, tokens[None], seen[None], cache)
        return logits[0], cache

    def of_group(prefix, *texts):  # which all read the one prefix
        return jax.vmap(partial(of_row, prefix))(*texts)

    parted = jax.tree.map(lambda x: x.reshape(rows // group, group, *x.shape[1:]), (tokens, seen, cache))
    out = jax.vmap(of_group)(model.prefix, *parted)
    return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), out)


def _step(program, model, draft, given, keys, first, T, state):
    """Guesses, reads the last token and the guesses, and draws until a guess is wrong: one token at least."""
    K, rows = program.ahead, len(state.token)
    index = state.done[:, None] + jnp.arange(K + 1)[None]
    keys = jax.vmap(lambda key, n: jax.vmap(partial(jax.random.fold_in, key))(n))(keys, index)
    if program.of_draft is None:
        look = partial(look_up, count=K, match=program.match)
        guesses, of_draft = jax.vmap(look)(state.text, first, T + state.done), None
    else:
        guesses, of_draft = _drafted(program, draft, given, keys, state)
    tokens = jnp.concatenate([state.token[:, None], guesses], 1)
    # what lies beyond a row's limit is never asked for, and may lie beyond the positions that the model has learned
    alive = state.alive[:, None] & (index < given.limits[:, None])
    logits, cache = _read(model, tokens, alive, state.cache)
    so_far = penalties.of_columns(state.history, tokens, alive, alive & (jnp.arange(K + 1) > 0)[None])
    logits = transform(logits, given.how, index, so_far)
    drawn = draw(keys.reshape(-1), logits.reshape(rows * (K + 1), -1)).reshape(rows, K + 1)
    of_token = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], 2)[..., 0]
    # the first is right in any case, another where all guesses before it were, and nothing ended before
    goes_on = (drawn[:, :-1] == guesses) & ~jnp.isin(drawn[:, :-1], given.ends)
    kept = 1 + jnp.cumprod(goes_on, 1, dtype=jnp.int32).sum(1)
    kept = jnp.where(state.alive, jnp.minimum(kept, given.limits - state.done), 0)
    keep = jnp.arange(K + 1)[None] < kept[:, None]
    put = lambda x, new, at: x.at[jnp.arange(rows)[:, None], jnp.where(keep, at, x.shape[1])].set(new, mode="drop")
    last = jnp.take_along_axis(drawn, jnp.maximum(kept - 1, 0)[:, None], 1)[:, 0]
    done = state.done + kept
    forget = jax.vmap(program.forget)
    return _State(
        cache=forget(cache, K + 1 - kept), draft=None if draft is None else forget(of_draft, K + 1 - kept),
        text=put(state.text, drawn, T + index), logps=put(state.logps, of_token, index),
        history=penalties.after(state.history, drawn, keep, keep), token=jnp.where(state.alive, last, state.token),
        alive=state.alive & ~jnp.isin(last, given.ends) & (done < given.limits), done=done,
        reads=state.reads + state.alive,
    )  # fmt: skip


def _drafted(program, draft, given, keys, state):
    """What the draft model would say [B, K], and its cache, which has read all of it."""

    def step(carry, xs):
        (cache, history, token), (key, i) = carry, xs
        there = (state.alive & (state.done + i < given.limits))[:, None]
        logits, cache = _read(draft, token[:, None], there, cache)
        history_now = jax.tree.map(lambda x: x[:, None], history)
        logits = transform(logits, given.how, (state.done + i)[:, None], history_now)[:, 0]
        token = draw(key, logits)
        history = penalties.after(history, token[:, None], state.alive[:, None], state.alive[:, None])
        return (cache, history, token), token

    begin = state.draft, state.history, state.token
    (cache, _, _), guesses = jax.lax.scan(step, begin, (keys.T, jnp.arange(program.ahead + 1)))
    return guesses[:-1].T, cache


def look_up(text, first, end, *, count, match):
    """What followed the last tokens of a text when they stood in it before.

    Args:
      text: [W] int32.
      first, end: the text is what is in columns first to end - 1.
      count: how many tokens to guess.
      match: how many of the last tokens are compared at most.

    Returns:
      [count] int32; where the text has too few, those that it has over and over.

    >>> print(look_up(jnp.array([7, 1, 2, 3, 4, 1, 2, 0]), 0, 7, count=3, match=2))
    [3 4 1]
    """
    column = jnp.arange(len(text))
    back = lambda i: (column - i >= first) & (jnp.roll(text, i) == text[jnp.maximum(end - 1 - i, 0)])
    same = jnp.cumprod(jnp.stack([back(i) for i in range(match)]), 0).sum(0)  # ending here as the text does
    at = jnp.argmax(jnp.where((column >= first) & (column < end - 1), same * len(text) + column, -1))
    at = jnp.maximum(at, first)  # of a single token, which nothing stands before
    return text[at + 1 + jnp.arange(count) % jnp.maximum(end - 1 - at, 1)]
