"""Sampling from texts to texts: prompts of different lengths in, decoded completions out, whole or as they come.

A stop string ends a completion. The text is what stands before it; the tokens are all up to and with the one that
completes it, since these were sampled and have log-probabilities. It is looked for in the decoded text without special
tokens, so it may begin and end within tokens, and characters of several bytes may be spread over several.
"""

import re
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

from pt_jax.data import batches
from pt_jax.sampling import asked

MARGIN = 8  # characters and tokens: what may read otherwise where a text is cut off before
WINDOW = 32  # tokens of a row that are decoded again when there are new ones, before the first half is left out
# What a tokenizer that cleans up may take the space off when more has come: ".", "?", "!", ",", " ' ", "n't", "'ve" and
# others. " n ' t" becomes "n't", one space after the other.
CLEANED = re.compile(r" (n ?'?|'[vr]?)?\Z")


def pad_prompts(prompts, *, pad_token: int, length: int | None = None):
    """Token arrays of different lengths as the left-padded (prompts, seen), each [P, T], that ``sample`` takes.

    >>> tokens, seen = pad_prompts([np.array([5, 6]), np.array([7])], pad_token=0, length=3)
    >>> tokens.tolist(), seen.astype(int).tolist()
    ([[0, 5, 6], [0, 0, 7]], [[0, 1, 1], [0, 0, 1]])
    """
    _check_prompts(prompts)
    asked.pad_of(pad_token)
    length = batches.bucket(max(map(len, prompts))) if length is None else length
    tokens = batches.pad([np.asarray(p, np.int32) for p in prompts], length, pad_token, left=True)
    return tokens, batches.pad([np.ones(len(p), bool) for p in prompts], length, False, left=True)


def _check_prompts(prompts):
    if not len(prompts):
        raise ValueError("prompts is empty; give one at least")
    for i, prompt in enumerate(map(np.asarray, prompts)):
        if prompt.size and not np.issubdtype(prompt.dtype, np.integer):
            raise ValueError(f"prompt {i} is of type {prompt.dtype}; give an array of token ids")
        if prompt.ndim != 1:
            raise ValueError(f"prompt {i} has shape {prompt.shape}; give an array of token ids [T]")
        if (bad := prompt[(prompt < 0) | (prompt > asked.MOST)]).size:
            raise ValueError(f"prompt {i} has the id {bad[0]}, which is in no vocabulary")


def to_texts(tokenizer, completions, stop=()) -> list[str]:
    """What was sampled in each row, up to its end, without special tokens; and what is before the first stop string."""
    stop = _stops(stop)
    out = jax.device_get(completions)
    rows = [tokens[alive].tolist() for tokens, alive in zip(out.tokens, out.alive)]
    return [before(text, stop) for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]


def _stops(stop) -> tuple[str, ...]:
    given = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else (None,)
    if not all(isinstance(s, str) and s for s in given):
        raise ValueError(f"stop must be a tuple of strings that are not empty, got {stop!r}")
    return given


def before(text: str, stop) -> str:
    """What of a text stands before the first of the stop strings.

    >>> before("one two three", ("three", "two"))
    'one '
    """
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


def stop_at(tokenizer, stop) -> Callable[[list[int], int], int | None]:
    """The ``until`` of ``stream``: how many of some tokens it takes until their text has one of the stop strings.

    Of a text that was looked at before, only the end is decoded again: so much of it that a stop string that ends in
    the new tokens would be in it whole. Where that begins within a character, more is decoded. What is found is looked
    for once more in the whole text.

    Args:
      tokenizer: to decode with.
      stop: strings.

    Returns:
      A function of the tokens, and of how many of them are known to have no stop string; 0 unless given.

    Raises:
      ValueError: a stop string is empty, or it is one string instead of several.
    """
    stop, cleans = _stops(stop), _cleans(tokenizer)
    longest = max(map(len, stop), default=0)
    decoded = lambda tokens: tokenizer.batch_decode([tokens], skip_special_tokens=True)[0]
    has = lambda text: any(s in text for s in stop)

    def recent(tokens, before):
        back = longest + MARGIN
        while back < before:
            for first in range(before - back, max(before - back - 4, 0), -1):  # a character has up to four bytes
                text = decoded(tokens[first:])
                if "\ufffd" not in text.rstrip("\ufffd"):
                    if len(decoded(tokens[first:before]).rstrip("\ufffd")) >= longest + MARGIN:
                        return text
                    break
            back *= 2
        return decoded(tokens)

    def first(tokens, start):
        each = ((n, recent(tokens[:n], n - 1)) for n in range(start, len(tokens) + 1))
        return next((n for n, text in each if has(text) and has(decoded(tokens[:n]))), None)

    def until(tokens, before=0):
        if cleans:  # what has a stop string now may be without it when more has come
            return first(tokens, before + 1)
        for n in range(len(tokens), max(before, len(tokens) - 4), -1):
            text = recent(tokens[:n], before)
            if has(text):
                return first(tokens, 1)
            if not text.endswith("\ufffd"):  # else the last character is not there yet, and may hide the others
                break
        return None

    return until


def _cleans(tokenizer) -> bool:
    """Whether it takes spaces out of a text, such as those before " n't"."""
    return bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))


def stream_texts(
    streamer, params, tokenizer, prompts, key, *, pad_token: int, stop=(), group: int = 1
) -> Iterator[list[str]]:
    """Completes prompts and yields what there is of new text, every few tokens.

    What is yielded is never taken back: bytes that are no character yet, and a beginning of a stop string, are kept
    until it is known what becomes of them.

    Args:
      streamer: ``stream`` with everything bound but params, prompts, seen, key, group and until.
      params, tokenizer, prompts, key, pad_token, group: as ``complete``; all prompts at a time.
      stop: strings that end a completion.

    Yields:
      A string a row, often empty. All of a row's, one after the other, are its text. But by some tokenizers
      (those with "byte fallback") a whole run of bytes decodes to \ufffd when some are no character, as where a limit
      cuts one: then what was shown of the run before stands in the place of as many \ufffd.
    """
    stop = _stops(stop)
    asked.counts(group=group)
    tokens, seen = pad_prompts(prompts, pad_token=pad_token)
    until = stop_at(tokenizer, stop) if stop else None
    rows = [_Said(tokenizer, stop) for _ in range(len(prompts) * group)]
    for part in streamer(params, tokens, seen, key, group=group, until=until):
        over = part.ended | part.stopped
        yield [row.new(ids[alive].tolist(), o) for row, ids, alive, o in zip(rows, part.tokens, part.alive, over)]
    yield [row.new([], True) for row in rows]


class _Said:
    """What a row says, by its last tokens: their text is the end of the text of all, but for what was given before."""

    def __init__(self, tokenizer, stop):
        self.decoded = lambda tokens: tokenizer.batch_decode([tokens], skip_special_tokens=True)[0]
        self.cleans = _cleans(tokenizer)
        self.stop, self.tokens, self.given, self.most, self.over = stop, [], 0, WINDOW, False

    def new(self, tokens, over) -> str:
        """What there is to give after more tokens; all, when the row is over."""
        if self.over or not (tokens or over):
            return ""
        self.tokens, self.over = self.tokens + tokens, over
        count, text = (len(self.tokens), self.decoded(self.tokens)) if over else self._whole()
        certain = before(text, self.stop)
        certain = certain if over else certain[: len(certain) - self._uncertain(certain)]
        out, self.given = certain[self.given :], max(self.given, len(certain))
        if len(self.tokens) > self.most and not text.endswith("\ufffd"):
            self._leave_out(count, text)
        return out

    def _whole(self):
        """How many tokens end with a whole character, and their text: bytes of the next may hide those before it."""
        many = len(self.tokens)
        each = ((n, self.decoded(self.tokens[:n])) for n in range(many, max(many - 4, 0), -1))
        return next((x for x in each if not x[1].endswith("\ufffd")), (many, self.decoded(self.tokens)))

    def _leave_out(self, count, text):
        """Leaves out first tokens, where the others alone read as they do behind them.

        They do not where a character lies across, or where a first token reads otherwise: then it is the next one's
        turn. Behind a whole character, what comes later changes neither.
        """
        half = count // 2
        for first in range(half, min(half + MARGIN, count)):
            end = self.decoded(self.tokens[first:count])
            rest = len(text) - len(end)
            if end and text.endswith(end) and rest <= self.given <= len(text):
                self.tokens, self.given, self.most = self.tokens[first:], self.given - rest, WINDOW
                return
        self.most = 2 * len(self.tokens)

    def _uncertain(self, text) -> int:
        """How many characters at the end may become others: bytes without their last, a stop string's beginning."""
        whole = text.rstrip("\ufffd")
        stays = CLEANED.sub("", whole) if self.cleans else whole
        begun = (n for s in self.stop for n in range(len(s) - 1, 0, -1) if stays.endswith(s[:n]))
        return len(text) - len(stays) + max(begun, default=0)


def complete(
    sampler, params, tokenizer, prompts, key, *, pad_token: int, rows: int = 64, group: int = 1, stop=()
) -> list[str]:
    """Completes prompts of any number and lengths, some at a time.

    Args:
      sampler: ``sample`` with everything bound but params, prompts, seen, key, group and prompt_ids; or
        ``sample_until`` with ``until=stop_at(tokenizer, stop)``, so that rows end at stop strings.
      params: of the model.
      tokenizer: to decode with.
      prompts: token arrays.
      key: PRNG key; prompt i uses fold_in(key, i), however many are sampled at a time.
      pad_token: fills short prompts.
      rows: prompts at a time.
      group: completions a prompt.
      stop: strings, before the first of which the texts end.

    Returns:
      Texts, those of one prompt after each other.
    """
    stop = _stops(stop)
    _check_prompts(prompts)
    asked.counts(rows=rows, group=group)
    length = batches.bucket(max(map(len, prompts)))
    rows, texts = min(rows, len(prompts)), []
    for i in range(0, len(prompts), rows):
        ids = np.arange(i, i + rows)
        part = [prompts[min(j, len(prompts) - 1)] for j in ids]  # one shape, so one trace
        tokens, seen = pad_prompts(part, pad_token=pad_token, length=length)
        out = sampler(params, tokens, seen, key, group=group, prompt_ids=ids)
        texts += to_texts(tokenizer, out, stop)[: (len(prompts) - i) * group]
    return texts
