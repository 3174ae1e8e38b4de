"""What a sampler is asked for, checked before anything is compiled; what is traced has no numbers yet, and passes."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np


def check_prompts(seen):
    """Fails unless every prompt has a token and its padding in front."""
    if (given := _known(seen)) is None:
        return
    if given.dtype != bool:
        raise ValueError(f"seen is of type {given.dtype}; give bool, True for the tokens of the prompts")
    if given.shape[1] == 0:
        raise ValueError("prompts has no column: each prompt must have a token at least")
    bad = np.flatnonzero(~(given[:, -1] & (given[:, 1:] >= given[:, :-1]).all(-1)))
    if bad.size:
        raise ValueError(f"prompt {bad[0]} is empty or not left-padded: its last column must be seen, and no gap")


def limits_of(limits, rows, length):
    """The most tokens of each row, [B] int32; N for all when None."""
    if limits is None:
        return jnp.full(rows, length, jnp.int32)
    if jnp.shape(limits) != (rows,):
        raise ValueError(f"limits has shape {jnp.shape(limits)}, expected [{rows}], one a row")
    given = _known(limits)
    if given is not None and not ((given >= 1) & (given <= length)).all():
        raise ValueError(f"limits must be from 1 to length={length}, got {given.tolist()}")
    return jnp.asarray(limits, jnp.int32)


def forced_of(forced, rows, length):
    """Tokens to take instead of drawing them, [N, B] int32; -1 for all when None."""
    if forced is None:
        return jnp.full((length, rows), -1, jnp.int32)
    if jnp.shape(forced) != (rows, length):
        raise ValueError(f"forced has shape {jnp.shape(forced)}, expected [{rows}, {length}], a token or -1 each")
    return jnp.asarray(forced, jnp.int32).T


def check(program, params, prompts, seen, *, how, end_tokens, limits=None, forced=None):
    """Fails when an id is not in the vocabulary, a text is too long, or the stops contradict each other.

    Args:
      program: of ``decode.prepared``.
      params: of the model, which is traced once, to see how many tokens it knows.
      prompts, seen, how, end_tokens, limits, forced: as ``sample``, and as they were given: what the host has, it need
        not fetch.
    """
    limits = _known(program.length if limits is None else limits)
    prompts, seen, ends = _known(prompts), _known(seen), _ids(end_tokens)
    if seen is not None and limits is not None:
        _check_longest(program, np.repeat(seen.sum(1), program.group), limits)
    if how is not None and limits is not None:
        _check_stops(how, ends, limits)
    if prompts is None or seen is None:
        return
    vocab = vocabulary(program, params)
    held = None if how is None else _ids(how.end_tokens)
    of_name = {"prompts": prompts[seen], "end_tokens": ends, "how.end_tokens": held, "forced": _known(forced)}
    for name, ids in of_name.items():
        if ids is not None and ids.size and (ids.max() >= vocab or (name == "prompts" and ids.min() < 0)):
            wrong = ids.max() if ids.max() >= vocab else ids.min()
            raise ValueError(f"{name} has the id {wrong}, but the model knows {vocab} tokens, 0 to {vocab - 1}")
    if program.alternatives > vocab:
        raise ValueError(f"alternatives={program.alternatives} is more than the {vocab} tokens that the model knows")


def _check_longest(program, tokens, limits):
    longest = getattr(program.init_cache, "longest", None)
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
    least, held, allowed = _known(how.min_length), _ids(how.end_tokens), _known(how.allowed)
    if least is not None and (least > limits).any():
        raise ValueError(f"min_length={least.max()} is more than the {limits.min()} tokens that a row may have")
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


def _known(x):
    """An array of the host; None where there is none, or none yet, or a part of it is with another host."""
    hidden = lambda leaf: isinstance(leaf, jax.core.Tracer) or not getattr(leaf, "is_fully_addressable", True)
    return None if x is None or any(map(hidden, jax.tree.leaves(x))) else np.asarray(x)


def _ids(x):
    given = _known(x)
    return None if given is None else given.astype(int)  # of no ids, too
