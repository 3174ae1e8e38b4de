"""Verifiable rewards for answers that are known."""

import re
from decimal import Decimal

_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def last_number(text: str) -> Decimal | None:
    """The last number that a text names, exactly as written.

    >>> last_number("3 apples and 1,024.50 pears."), last_number("none")
    (Decimal('1024.50'), None)
    """
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def number(completion: str, row: dict) -> float:
    """1.0 when the last number of the completion is that of the row's answer, else 0.0.

    Args:
      completion: what was sampled, without special tokens.
      row: with "answer", a string or a number.

    Raises:
      ValueError: the row's answer names no number.

    >>> number("2 + 2 = 4.", {"answer": "4.0"}), number("five", {"answer": 5})
    (1.0, 0.0)
    """
    want = last_number(str(row["answer"]))
    if want is None:
        raise ValueError(f"{row.get('source', 'row')}: the answer has no number: {row['answer']!r}")
    return float(last_number(completion) == want)


def exact(completion: str, row: dict) -> float:
    """1.0 when the completion is the row's answer, apart from white space around it, else 0.0.

    >>> exact(" yes\\n", {"answer": "yes"}), exact("yes!", {"answer": "yes"})
    (1.0, 0.0)
    """
    return float(completion.strip() == str(row["answer"]).strip())
