"""Sampling from texts to texts: prompts of different lengths in, decoded completions out."""

import jax
import numpy as np

from pt_jax.data import batches


def pad_prompts(prompts, *, pad_token: int, length: int | None = None):
    """Token arrays of different lengths as the left-padded (prompts, seen), each [P, T], that ``sample`` takes.

    >>> tokens, seen = pad_prompts([np.array([5, 6]), np.array([7])], pad_token=0, length=3)
    >>> tokens.tolist(), seen.astype(int).tolist()
    ([[0, 5, 6], [0, 0, 7]], [[0, 1, 1], [0, 0, 1]])
    """
    length = batches.bucket(max(map(len, prompts))) if length is None else length
    tokens = batches.pad([np.asarray(p, np.int32) for p in prompts], length, pad_token, left=True)
    return tokens, batches.pad([np.ones(len(p), bool) for p in prompts], length, False, left=True)


def to_texts(tokenizer, completions) -> list[str]:
    """What was sampled in each row, up to its end, without special tokens."""
    out = jax.device_get(completions)
    rows = [tokens[alive].tolist() for tokens, alive in zip(out.tokens, out.alive)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def complete(sampler, params, tokenizer, prompts, key, *, pad_token: int, rows: int = 64, group: int = 1) -> list[str]:
    """Completes prompts of any number and lengths, some at a time.

    Args:
      sampler: ``sample`` with everything bound but params, prompts, seen, key, group and prompt_ids.
      params: of the model.
      tokenizer: to decode with.
      prompts: token arrays.
      key: PRNG key; prompt i uses fold_in(key, i), however many are sampled at a time.
      pad_token: fills short prompts.
      rows: prompts at a time.
      group: completions a prompt.

    Returns:
      Texts, those of one prompt after each other.
    """
    length = batches.bucket(max(map(len, prompts)))
    rows, texts = min(rows, len(prompts)), []
    for i in range(0, len(prompts), rows):
        ids = np.arange(i, i + rows)
        part = [prompts[min(j, len(prompts) - 1)] for j in ids]  # one shape, so one trace
        tokens, seen = pad_prompts(part, pad_token=pad_token, length=length)
        out = sampler(params, tokens, seen, key, group=group, prompt_ids=ids)
        texts += to_texts(tokenizer, out)[: (len(prompts) - i) * group]
    return texts
