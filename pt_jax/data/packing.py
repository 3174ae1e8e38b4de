"""Several examples a row: of texts of many lengths, fewer numbers are padding; what they share stands once.

The texts of a row do not see each other and each begins at position 0 (``models.visibility``), so a step computes what
it would compute from rows of one text each. Only positions that depend on the room of a row do not come out alike:
``longrope`` takes its list for long texts when a row is long, whatever stands in it.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pt_jax.data.encode import Example


class Packed(NamedTuple):
    """Rows of several texts, and which text stands where.

    Args:
      tokens: [R, T] int32.
      seen: [R, T] int32, 1, 2, 3, ... for the texts of a row in order, 0 for padding.
      mask: [R, T] bool, the tokens that are scored; never the first of a text, which nothing predicts.
      places: (row, first column) of each example, in the order of the examples.
    """

    tokens: np.ndarray
    seen: np.ndarray
    mask: np.ndarray
    places: list[tuple[int, int]]

    @property
    def filled(self) -> float:
        """The share of the numbers that are tokens and not padding."""
        return float((self.seen > 0).mean())


def plan(lengths, length: int) -> list[list[int]]:
    """Which texts go together: the longest first, each into the fullest row that has room for it.

    Best-fit decreasing: at most 11/9 of the fewest rows that are possible, and four more (Johnson et al. 1974,
    https://doi.org/10.1137/0203025).

    Args:
      lengths: of the texts, in tokens.
      length: of a row.

    Returns:
      For each row its texts, by their numbers, in order of their numbers. The same for the same lengths, always.

    >>> plan([3, 5, 2, 4], 8)
    [[0, 1], [2, 3]]
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of each row, sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fullest = bisect.bisect_left(room, (lengths[i], 0))
        free, row = room.pop(fullest) if fullest < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        bisect.insort(room, (free - lengths[i], row))
    return [sorted(row) for row in sorted(rows, key=min)]


def pack(examples: Sequence[Example], *, length: int, pad_token: int, rows: int | None = None) -> Packed:
    """Examples as few rows.

    Args:
      examples: of ``data.encode``.
      length: T of a row; no example is longer.
      pad_token: fills what is left of a row; it may be any id.
      rows: R; as few as are needed when None. Rows that are left over are padding.

    Raises:
      ValueError: an example does not fit a row, or the examples do not fit the rows.
    """
    for i, e in enumerate(examples):
        if len(e.tokens) > length:
            name = e.source or f"example {i}"
            raise ValueError(
                f"{name}: has {len(e.tokens)} tokens, a packed row has room for {length}; make rows longer"
            )
    together = plan([len(e.tokens) for e in examples], length)
    if rows is not None and len(together) > rows:
        raise ValueError(f"{len(examples)} examples take {len(together)} rows of {length} tokens, there are {rows}")
    count = len(together) if rows is None else rows
    tokens, seen = np.full((count, length), pad_token, np.int32), np.zeros((count, length), np.int32)
    mask, places = np.zeros((count, length), bool), [(0, 0)] * len(examples)
    for row, texts in enumerate(together):
        end = 0
        for number, i in enumerate(texts, 1):
            start, end = end, end + len(examples[i].tokens)
            tokens[row, start:end], seen[row, start:end] = examples[i].tokens, number
            mask[row, start + 1 : end] = examples[i].mask[1:]
            places[i] = row, start
    return Packed(tokens, seen, mask, places)


def lay(values, packed: Packed) -> np.ndarray:
    """What is known of each text's tokens, such as their weights, put where its tokens stand.

    Args:
      values: [N, S], row i of example i; what is behind its end is left out.
      packed: of ``pack``.

    Returns:
      [R, T] in the type of the values, 0 in padding.

    >>> rows = pack([Example(np.arange(2), np.ones(2, bool)), Example(np.arange(1), np.ones(1, bool))],
    ...             length=4, pad_token=0)
    >>> lay(np.array([[1, 2, 3], [4, 5, 6]]), rows).tolist()
    [[1, 2, 4, 0]]
    """
    out = np.zeros(packed.tokens.shape, values.dtype)
    for value, (row, start) in zip(values, packed.places):
        size = int((packed.seen[row] == packed.seen[row, start]).sum())
        out[row, start : start + size] = value[:size]
    return out


class Shared(NamedTuple):
    """Rows of texts that begin alike: [beginning | rest of the first | rest of the second | ...].

    Args:
      tokens: [R, T] int32.
      seen: [R, T, 2] int32, text and branch: branch i + 1 is what only the i-th example of a row has.
      mask: [R, T] bool, the tokens that are scored.
    """

    tokens: np.ndarray
    seen: np.ndarray
    mask: np.ndarray


def share(groups, *, length: int, pad_token: int) -> Shared:
    """Each group of examples as one row, in which what all of them begin with and none scores stands once.

    The last token of the beginning is repeated in front of each rest, as part of it. So every token is predicted from
    the one before it in the row, as in any row. A prompt of P tokens with G answers of n takes P - 1 + G (n + 1)
    tokens, not G (P + n).

    Args:
      groups: of examples of ``data.encode``: a pair, or a prompt's answers.
      length: T of a row.
      pad_token: fills what is left of a row; it may be any id.

    Raises:
      ValueError: a group does not fit a row.
    """
    shape = len(groups), length
    tokens, seen = np.full(shape, pad_token, np.int32), np.zeros((*shape, 2), np.int32)
    mask = np.zeros(shape, bool)
    for row, group in enumerate(groups):
        first = max(_alike(group) - 1, 0)  # of the rests
        size = shared_length(group)
        if size > length:
            name = group[0].source or f"group {row}"
            raise ValueError(f"{name}: takes {size} tokens together, a row has room for {length}; make rows longer")
        tokens[row, :first], seen[row, :size, 0], end = group[0].tokens[:first], 1, first
        for branch, e in enumerate(group, 1):
            start, end = end, end + len(e.tokens) - first
            tokens[row, start:end], seen[row, start:end, 1] = e.tokens[first:], branch
            mask[row, start + 1 : end] = e.mask[first + 1 :]
    return Shared(tokens, seen, mask)


def shared_length(group) -> int:
    """How many tokens a group takes in ``share``."""
    first = max(_alike(group) - 1, 0)
    return first + sum(len(e.tokens) - first for e in group)


def _alike(group):
    """How many tokens all begin with and none scores."""
    shortest = min(len(e.tokens) for e in group)
    tokens = np.stack([e.tokens[:shortest] for e in group])
    scored = np.stack([e.mask[:shortest] for e in group])
    return int(np.cumprod((tokens == tokens[:1]).all(0) & ~scored.any(0)).sum())
