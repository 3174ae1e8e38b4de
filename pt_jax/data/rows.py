"""Data files to rows, every row checked: a bad one is named by file and line before anything is trained.

Columns have TRL's names; a text is a string, taken as it stands, or a list of messages, put through the tokenizer's
chat template:

    =============  ==============================  ===================================
    kind           columns                         for
    =============  ==============================  ===================================
    text           text                            pre-training: every token is scored
    messages       messages                        SFT on the assistant's turns
    completion     prompt, completion              SFT on the completion
    preference     prompt, chosen, rejected        DPO
    question       prompt, answer                  reinforcement learning
    =============  ==============================  ===================================
"""

import json
import math
import pathlib

KINDS = {
    "text": ("text",),
    "messages": ("messages",),
    "preference": ("prompt", "chosen", "rejected"),
    "completion": ("prompt", "completion"),
    "question": ("prompt", "answer"),
}


def read(path, *, kinds=tuple(KINDS)) -> list[dict]:
    """Reads and checks a data file.

    Args:
      path: a ``.jsonl`` file (one JSON object a line; empty lines are skipped), a ``.parquet`` file, or a folder of
        ``datasets.Dataset.save_to_disk``.
      kinds: the kinds of rows that the caller can use; all rows of a file must be of one, and of one only.

    Returns:
      The rows in order, each with "kind", and "source" ("FILE:LINE") for messages about it.

    Raises:
      ValueError: the file or a row is not as described; the message names the line.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file; give a .jsonl or .parquet file")
    lines = _jsonl(path) if path.is_file() and path.suffix != ".parquet" else _dataset(path)
    rows = [_checked(row, source, kinds) for source, row in lines]
    if not rows:
        raise ValueError(f"{path}: has no rows")
    for row in rows:
        if row["kind"] != rows[0]["kind"]:
            raise ValueError(f"{row['source']}: is a {row['kind']} row, but the rows before are {rows[0]['kind']} rows")
    return rows


def write_jsonl(path, rows) -> None:
    """Writes rows as JSON in UTF-8, one a line."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    pathlib.Path(path).write_text(text, encoding="utf-8")


def _jsonl(path):
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as e:
        raise ValueError(f"{path}: cannot be read as UTF-8 text ({e})") from e
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as e:
                raise ValueError(f"{path}:{number}: is not JSON ({e.msg} at column {e.colno})") from e
            except (ValueError, RecursionError) as e:  # a number of thousands of digits, thousands of brackets
                raise ValueError(f"{path}:{number}: is not JSON that can be read ({e})") from e


def _dataset(path):
    import datasets

    try:
        read = datasets.load_from_disk if path.is_dir() else datasets.Dataset.from_parquet
        data = read(str(path))
    except Exception as e:  # the library raises a dozen kinds, some of them bare
        raise ValueError(f"{path}: the datasets library cannot read it ({type(e).__name__}: {e})") from e
    if isinstance(data, datasets.DatasetDict):
        raise ValueError(
            f"{path}: holds the splits {', '.join(data)}; give the folder of one, {path / next(iter(data))}"
        )
    for number, row in enumerate(data, 1):
        yield f"{path}:{number}", {k: v for k, v in row.items() if v is not None}


def _checked(row, source, kinds):
    if not isinstance(row, dict):
        raise ValueError(f"{source}: is {type(row).__name__}, expected an object with named columns")
    fitting = [k for k in KINDS if k in kinds and all(c in row for c in KINDS[k])]
    written = lambda of: " or ".join(" + ".join(KINDS[k]) for k in of)
    if not fitting:
        has = ", ".join(sorted(row)) or "(none)"
        raise ValueError(f"{source}: has the columns {has}; expected {written(kinds)}")
    if len(fitting) > 1:
        raise ValueError(f"{source}: could be read as {written(fitting)}; leave out the columns of all but one")
    (kind,) = fitting
    for column in KINDS[kind]:
        if column == "answer":  # for the reward to judge
            number = isinstance(row[column], int | float) and not isinstance(row[column], bool)
            if not isinstance(row[column], str) and not (number and math.isfinite(row[column])):
                raise ValueError(f"{source}: answer must be a string or a finite number, got {row[column]!r:.60}")
            check_characters(str(row[column]), f"{source}: {column}")
        else:
            _check_text(row[column], f"{source}: {column}", chat_only=column == "messages")
    texts = [row[c] for c in KINDS[kind] if c != "answer"]
    if len({isinstance(t, str) for t in texts}) > 1:
        raise ValueError(f"{source}: some columns are strings and some are messages; all must be of one form")
    return row | {"kind": kind, "source": source}


def check_characters(text: str, what: str) -> None:
    """Fails where a text holds half a surrogate pair: JSON can write one, and a shell can, but it is no character.

    >>> check_characters("a\\ud800", "rows.jsonl:3: text")
    Traceback (most recent call last):
    ValueError: rows.jsonl:3: text is not Unicode text: '\\ud800' at character 2 is half of a character
    """
    try:
        text.encode()
    except UnicodeEncodeError as e:
        half = f"{text[e.start]!a} at character {e.start + 1} is half of a character"
        raise ValueError(f"{what} is not Unicode text: {half}") from e


def _check_text(value, what, chat_only):
    if isinstance(value, str) and not chat_only:
        if not value:
            raise ValueError(f"{what} is empty")
        return check_characters(value, what)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{what} must be {'' if chat_only else 'a string or '}a list of messages, got {value!r:.60}")
    for i, message in enumerate(value):
        good = isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))
        if not good:
            raise ValueError(f"{what}[{i}] must have role and content, both strings, got {message!r:.60}")
        check_characters(message["role"] + message["content"], f"{what}[{i}]")
