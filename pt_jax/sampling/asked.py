"""What a sampler is asked for, checked before anything is compiled; what is traced has no numbers yet, and passes."""

from collections.abc import Hashable, Iterable
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from pt_jax import checks
from pt_jax.sampling.distribution import Sampling

MOST = 2**31 - 1  # of int32


def counts(**numbers):
    """Fails unless all are whole numbers above 0: they are part of the program."""
    for name, x in numbers.items():
        if not is_whole(x):
            raise ValueError(f"{name} must be a whole number above 0, got {x!r}")
        checks.positive(name, x)


def number(name, x):
    """Fails unless it is one finite number; one that is traced is not known yet."""
    if isinstance(x, jax.core.Tracer):
        return
    given = np.asarray(x)
    if given.ndim or not jnp.issubdtype(given.dtype, np.number) or not np.isfinite(given):
        raise ValueError(f"{name} must be a finite number, got {x!r}")


def check_alternatives(alternatives):
    """Fails unless it is how many of the likeliest tokens to return."""
    if not is_whole(alternatives):
        raise ValueError(f"alternatives must be a whole number, how many of the likeliest tokens, got {alternatives!r}")
    checks.between("alternatives", alternatives, 0, np.inf)


def functions(**given):
    """Fails unless all are functions that may be a part of a program."""
    for name, x in given.items():
        if not (callable(x) and isinstance(x, Hashable)):
            raise ValueError(f"{name} must be a function, such as models.bind(config) has, got {x!r}")


def names(name, given) -> tuple[str, ...]:
    """Names in a tuple."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ValueError(f"{name} must be names in a tuple, such as ('routes',), got {given!r}")
    given = tuple(given)
    if not all(isinstance(x, str) for x in given):
        raise ValueError(f"{name} must be names in a tuple, such as ('routes',), got {given!r}")
    return given


def key_of(key, rows):
    """A key of the new kind, or one a row [B]; keys of ``jax.random.PRNGKey`` are wrapped.

    >>> key_of(jax.random.PRNGKey(3), 2) == jax.random.key(3)
    Array(True, dtype=bool)
    """
    kind = getattr(key, "dtype", None)
    if kind == jnp.uint32 and key.shape[-1:] == jax.eval_shape(lambda: jax.random.PRNGKey(0)).shape:
        key = jax.random.wrap_key_data(jnp.asarray(key))
    elif kind is None or not jnp.issubdtype(kind, jax.dtypes.prng_key):
        what = type(key).__name__ if kind is None else f"an array of type {kind} and shape {key.shape}"
        raise ValueError(f"key must be of jax.random.key(seed), or an array of such, got {what}")
    if key.shape not in ((), (rows,)):
        raise ValueError(f"key has shape {key.shape}; give one key, or one for each of {rows} rows")
    return key


def ids_of(prompt_ids, prompts, key):
    """[P] int32 that address random numbers; of a key a row all 0 when None, since the keys tell the rows apart."""
    if prompt_ids is None:
        return jnp.zeros(prompts, jnp.int32) if key.ndim else jnp.arange(prompts)
    prompt_ids = _whole("prompt_ids", prompt_ids)
    if prompt_ids.shape != (prompts,):
        raise ValueError(f"prompt_ids has shape {prompt_ids.shape}, expected [P] with P={prompts} (from prompts)")
    return jnp.asarray(prompt_ids)


def how_of(how, rows):
    """The sampled distribution, with numbers a row as [B, 1]."""
    if not isinstance(how, Sampling | None):
        raise ValueError(f"how must be a Sampling, such as Sampling(temperature=0.7), got {how!r}")
    return (Sampling() if how is None else how).check().of_rows(rows)


def ends_of(end_tokens):
    """Ids that end a completion, [E] int32."""
    one = not isinstance(end_tokens, Iterable) or getattr(end_tokens, "ndim", 1) == 0
    ids = (None,) if one else tuple(end_tokens)
    if not all(map(_is_id, ids)):
        raise ValueError(f"end_tokens must be ids in a tuple, such as (2,), or () for none, got {end_tokens!r}")
    return jnp.asarray(ids, jnp.int32)


def pad_of(pad_token):
    """The id to fill up with, int32."""
    if not _is_id(pad_token):
        raise ValueError(f"pad_token must be an id, got {pad_token!r}; an end token will do")
    return jnp.asarray(pad_token, jnp.int32)


def check_prompts(prompts, seen) -> int:
    """Fails unless every prompt has a token and its padding in front; returns how many there are."""
    if not hasattr(prompts, "dtype"):
        raise ValueError(f"prompts is a {type(prompts).__name__}; give an array [P, T] of int32")
    if jnp.result_type(prompts) != jnp.int32:
        raise ValueError(f"prompts is of type {prompts.dtype}; give int32")
    if not hasattr(seen, "dtype") or not jnp.issubdtype(seen.dtype, jnp.bool_):
        kind = getattr(seen, "dtype", type(seen).__name__)
        raise ValueError(f"seen is of type {kind}; give bool, True for the tokens of the prompts")
    size = checks.shapes(prompts=(prompts, "P T"), seen=(seen, "P T"))
    if not size["P"]:
        raise ValueError("prompts has no row; give one prompt at least")
    if (given := known(seen)) is None:
        return size["P"]
    if given.shape[1] == 0:
        raise ValueError("prompts has no column: each prompt must have a token at least")
    bad = np.flatnonzero(~(given[:, -1] & (given[:, 1:] >= given[:, :-1]).all(-1)))
    if bad.size:
        raise ValueError(f"prompt {bad[0]} is empty or not left-padded: its last column must be seen, and no gap")
    return size["P"]


def limits_of(limits, rows, length):
    """The most tokens of each row, [B] int32; N for all when None."""
    if limits is None:
        return jnp.full(rows, length, jnp.int32)
    limits = _whole("limits", limits)
    if limits.shape != (rows,):
        raise ValueError(f"limits has shape {limits.shape}, expected [{rows}], one a row")
    given = known(limits)
    if given is not None and not ((given >= 1) & (given <= length)).all():
        raise ValueError(f"limits must be from 1 to length={length}, got {given.tolist()}")
    return jnp.asarray(limits, jnp.int32)


def forced_of(forced, rows, length):
    """Tokens to take instead of drawing them, [N, B] int32; -1 for all when None."""
    if forced is None:
        return jnp.full((length, rows), -1, jnp.int32)
    forced = _whole("forced", forced)
    if forced.shape != (rows, length):
        raise ValueError(f"forced has shape {forced.shape}, expected [{rows}, {length}], a token or -1 each")
    given = known(forced)
    if given is not None and given.min() < -1:
        raise ValueError(f"forced has the id {given.min()}; give -1 where a token is to be drawn")
    return jnp.asarray(forced, jnp.int32).T


def check(program, params, prompts, seen, *, how, end_tokens, pad_token, limits=None, forced=None):
    """Fails when an id is not in the vocabulary, a text is too long, or the stops contradict each other.

    Args:
      program: of ``decode.prepared``.
      params: of the model, which is traced once, to see how many tokens it knows.
      prompts, seen, how, end_tokens, pad_token, limits, forced: as ``sample``, and as they were given: what the host
        has, it need not fetch.
    """
    limits = known(program.length if limits is None else limits)
    prompts, seen = known(prompts), known(seen)
    ends = _ids(end_tokens if hasattr(end_tokens, "dtype") else tuple(end_tokens))
    if seen is not None and limits is not None:
        _check_longest(program, np.repeat(seen.sum(1), program.group), limits)
    if how is not None and limits is not None:
        _check_stops(how, ends, limits)
    if prompts is None or seen is None:
        return
    vocab = vocabulary(program, params)
    held = None if how is None else _ids(how.end_tokens)
    of_name = {
        "prompts": prompts[seen], "end_tokens": ends, "how.end_tokens": held, "forced": known(forced),
        "pad_token": _ids(pad_token),
    }  # fmt: skip
    for name, ids in of_name.items():
        below = name in ("prompts", "pad_token")  # of the others, a negative one never comes
        if ids is not None and ids.size and (ids.max() >= vocab or (below and ids.min() < 0)):
            wrong = ids.max() if ids.max() >= vocab else ids.min()
            raise ValueError(f"{name} has the id {wrong}, but the model knows {vocab} tokens, 0 to {vocab - 1}")
    if program.alternatives > vocab:
        raise ValueError(f"alternatives={program.alternatives} is more than the {vocab} tokens that the model knows")


def _check_longest(program, tokens, limits):
    longest = _longest(program.init_cache)
    if longest is None or (tokens + limits).max() <= longest:
        return
    row = int(np.argmax(tokens + limits))
    limit = (tokens + limits - tokens)[row]
    raise ValueError(
        f"prompt {row // program.group} has {tokens[row]} tokens and its completion up to {limit}, but the model has "
        f"positions for {longest} together; shorten the prompt, or ask for fewer tokens"
    )


def _check_stops(how, ends, limits):
    """Of what ``how`` holds back or forbids, and what ends a completion."""
    least, held, allowed = known(how.min_length), _ids(how.end_tokens), known(how.allowed)
    if least is not None and (bad := np.flatnonzero(least > limits)).size:
        least, limits = (np.atleast_1d(x) if np.ndim(x) else np.full(bad[0] + 1, x) for x in (least, limits))
        raise ValueError(f"min_length={least[bad[0]]} is more than the {limits[bad[0]]} tokens that a row may have")
    if ends is None:
        return
    ends = ends[ends >= 0]
    holds = least is not None and held is not None and least.max() > 0
    if holds and (early := set(ends.tolist()) - set(held.tolist())):
        raise ValueError(
            f"end token {min(early)} may come before min_length={least.max()} tokens, as Sampling's end_tokens are "
            f"{held.tolist()}; give it all that end a completion"
        )
    if allowed is None or max(ends.max(initial=-1), 0 if held is None else held.max(initial=-1)) >= len(allowed):
        return
    if ends.size and not allowed[ends].any():
        raise ValueError(
            f"allowed forbids every end token of {ends.tolist()}; give end_tokens=() to end at limits alone"
        )
    if holds and not np.delete(allowed, held[held >= 0]).any():
        raise ValueError("allowed permits end tokens alone, and min_length holds them back: no token may be drawn")


@lru_cache(64)
def _longest(init_cache) -> int | None:
    """The most tokens of a text, as the cache says by its shape; None where there may be any number."""
    cache = jax.eval_shape(partial(init_cache, 1, 1))
    return len(cache["longest"]) if isinstance(cache, dict) and "longest" in cache else None


def vocabulary(program, params) -> int:
    """How many tokens a model knows."""
    leaves, tree = jax.tree.flatten(params)
    return _vocabulary(
        program.apply, program.init_cache, tree, tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
    )


@lru_cache(64)
def _vocabulary(apply, init_cache, tree, leaves):
    params = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*x) for x in leaves])
    column = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1, 1), jnp.bool_)
    return jax.eval_shape(lambda params, *x: apply(params, *x, init_cache(1, 1))[0], params, *column).shape[-1]


def known(x):
    """An array of the host; None where there is none, or none yet, or a part of it is with another host."""
    hidden = lambda leaf: isinstance(leaf, jax.core.Tracer) or not getattr(leaf, "is_fully_addressable", True)
    return None if x is None or any(map(hidden, jax.tree.leaves(x))) else np.asarray(x)


def _whole(name, x):
    """An array of whole numbers of int32; fails for others, which would become such without a word."""
    x = x if hasattr(x, "dtype") else np.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} is of type {x.dtype}; give int32")
    given = known(x) if np.iinfo(x.dtype).max > MOST else None
    if given is not None and (bad := given[~_is_int32(given)]).size:
        raise ValueError(f"{name} has the number {bad[0]}, which is none of int32")
    return x


def _is_int32(x):
    return (x >= -MOST - 1) & (x <= MOST)


def is_whole(x) -> bool:
    """Whether it is one whole number of the host."""
    return isinstance(x, (int, np.signedinteger)) and not isinstance(x, bool)


def _is_id(x) -> bool:
    """Whether it is one whole number of int32, which may be traced."""
    whole = is_whole(x) or (hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.integer) and jnp.ndim(x) == 0)
    return whole and (isinstance(x, jax.core.Tracer) or bool(_is_int32(x)))


def _ids(x):
    given = known(x)
    return None if given is None else np.atleast_1d(given).astype(int)  # of no ids, too
