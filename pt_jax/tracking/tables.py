"""Tables of results, for the terminal and for text files."""

import io
import math
import re

_NUMBER = re.compile(r"~?[+-]?(\d[\d,]*\.?\d*|\.\d+)(e[+-]?\d+)?( ?(%|x|s|ms))?")
_NOTHING = ("", "-", "–", "n/a", "nan", "inf", "-inf")


def table(title: str, columns, rows):
    """A ``rich`` table whose columns of numbers are aligned to the right.

    Args:
      title: above the table.
      columns: the heads.
      rows: one sequence of cells a row: text, shown as it is; numbers, shown with three decimals; None, a dash.

    Returns:
      A ``rich.table.Table``. Text folds where the terminal is narrow, numbers do not.

    Raises:
      ValueError: there are no columns, or a row has another number of cells.

    >>> print(text(table("accuracy", ["model", "before", "after"], [["tiny", 0.125, 0.5], ["small", 0.25, None]])))
            accuracy
    <BLANKLINE>
      model   before   after
     ────────────────────────
      tiny     0.125   0.500
      small    0.250       –
    <BLANKLINE>
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    columns, rows = list(columns), [list(row) for row in rows]
    if not columns:
        raise ValueError("columns is empty; give the heads of the table")
    for i, row in enumerate(rows):
        if len(row) != len(columns):
            raise ValueError(f"rows[{i}] has {len(row)} cells, expected {len(columns)}, one for each of {columns}")
    cells = [[_shown(cell) for cell in row] for row in rows]
    out = Table(title=Text(title, "bold"), box=SIMPLE_HEAD)
    for i, head in enumerate(columns):
        column = [row[i] for row in cells]
        right = any(map(_is_number, column)) and all(c in _NOTHING or _is_number(c) for c in column)
        out.add_column(Text(str(head)), justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in cells:
        out.add_row(*map(Text, row))
    return out


def text(renderable, width: int = 80) -> str:
    """What ``rich`` would print, as plain text without colours, no line longer than ``width``."""
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width, color_system=None, force_terminal=False, _environ={}).print(renderable)
    return "\n".join(line.rstrip() for line in out.getvalue().split("\n")).rstrip("\n") + "\n"


def _is_number(cell: str) -> bool:
    return _NUMBER.fullmatch(cell) is not None


def _shown(cell) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int):
        return f"{cell:,}"
    value = float(cell)
    plain = value == 0 or 1e-3 <= abs(value) < 1e6 or not math.isfinite(value)
    return f"{value:,.3f}" if plain else f"{value:.2e}"
