"""Verifiable rewards for answers that are known."""

import re
from decimal import Decimal
from fractions import Fraction

# thousands may be set apart by commas; an exponent is bounded, because 1e999999999 would take for ever to compare
_PLAIN = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)(?:[eE][+-]?\d{1,4}(?!\d))?"
# after a digit, a letter or a bracket, "-" takes away or joins
_NUMBER = re.compile(rf"((?<![\w.)\]}}])-)?({_PLAIN})(?:/({_PLAIN}))?")


def numbers(text: str) -> list[Fraction]:
    """The numbers that a text names, in order, exactly as written; a fraction a/b is one.

    >>> [str(n) for n in numbers("10-3 of 1,024.50 pears: -.5, 3/4, 2e-1")]
    ['10', '3', '2049/2', '-1/2', '3/4', '1/5']
    """
    found = []
    for minus, above, below in _NUMBER.findall(text.replace("\u2212", "-")):
        above, below = (Fraction(Decimal(part.replace(",", "") or 1)) for part in (above, below))
        if below:  # 3/0 is no number
            found.append((-1 if minus else 1) * above / below)
    return found


def last_number(text: str) -> Fraction | None:
    """The last of the ``numbers`` of a text.

    >>> str(last_number("3 apples and 1,024.50 pears.")), last_number("none")
    ('2049/2', None)
    """
    return next(reversed(numbers(text)), None)


def number(completion: str, row: dict) -> float:
    """1.0 when the last number of the completion is that of the row's answer, else 0.0.

    Args:
      completion: what was sampled, without special tokens.
      row: with "answer": a number, or a string that names exactly one. Of a string with "####", which in GSM8K parts
        the way from the answer, what follows the last one.

    Raises:
      ValueError: the row's answer names no number, or several.

    >>> number("2 + 2 = 4.", {"answer": "4.0"}), number("five", {"answer": 5}), number("3/4", {"answer": "5/4"})
    (1.0, 0.0, 0.0)
    """
    want = numbers(str(row["answer"]).rpartition("####")[2])
    if len(want) != 1:
        what = f"must name one number, got {row['answer']!r:.60}"
        raise ValueError(f"{row.get('source', 'row')}: the answer {what}; --reward exact compares texts")
    return float(last_number(completion) == want[0])


def exact(completion: str, row: dict) -> float:
    """1.0 when the completion is the row's answer, apart from white space around it, else 0.0.

    >>> exact(" yes\\n", {"answer": "yes"}), exact("yes!", {"answer": "yes"})
    (1.0, 0.0)
    """
    return float(completion.strip() == str(row["answer"]).strip())
