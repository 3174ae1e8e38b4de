"""Tables: numbers line up, text stays as it is, and eighty columns are enough."""

import math

import pytest

from pt_jax.tracking.tables import table, text


def test_columns_of_numbers_are_aligned_right_and_those_of_text_left():
    rows = [["base", 0.1, 200, "+3.5%", "x1"], ["tuned", None, 12000, "-12%", "7"]]
    got = table("t", ["model", "loss", "n", "change", "mixed"], rows)
    assert [c.justify for c in got.columns] == ["left", "right", "right", "right", "left"]
    lines = [line for line in text(got).splitlines() if "base" in line or "tuned" in line]
    assert lines[0].index("0.100") + 5 == lines[1].index("–") + 1
    assert lines[0].index("200") + 3 == lines[1].index("12,000") + 6


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        (0.12345, "0.123"), (0.0, "0.000"), (1234.5, "1,234.500"), (1e-5, "1.00e-05"), (2.5e7, "2.50e+07"),
        (math.nan, "nan"), (-math.inf, "-inf"), (3, "3"), (True, "yes"), (None, "–"), ("81.2%", "81.2%"),
    ],
)  # fmt: skip
def test_cells_are_shown_as(cell, shown):
    assert next(table("t", ["c"], [[cell]]).columns[0].cells).plain == shown


def test_brackets_are_text_and_no_markup():
    assert "[B, T] [red]x[/red]" in text(table("[t]", ["[head]"], [["[B, T] [red]x[/red]"]]))
    assert "[t]" in text(table("[t]", ["[head]"], [])) and "[head]" in text(table("[t]", ["[head]"], []))


def test_long_text_folds_at_eighty_columns_and_numbers_stay_whole():
    got = text(table("results", ["path", "before", "after"], [["word " * 30 + "x" * 90, 123456.789, 0.123456]]))
    assert max(map(len, got.splitlines())) <= 80
    assert "123,456.789" in got and "0.123" in got and got.count("x") == 90 and got.count("word") == 30
    assert "\x1b" not in got
    got = text(table("results", ["path", *"abcde"], [["word " * 9, *[123456789] * 5]]))
    assert got.count("123,456,789") == 5 and max(map(len, got.splitlines())) <= 80


def test_a_row_of_another_length_is_named():
    with pytest.raises(ValueError, match=r"rows\[1\] has 1 cells, expected 2"):
        table("t", ["a", "b"], [[1, 2], [1]])
    with pytest.raises(ValueError, match="columns is empty"):
        table("t", [], [])
