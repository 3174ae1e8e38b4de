"""The README names only what exists."""

import importlib
import pathlib
import re

import pytest

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
ROOMS = ("advantages", "divergences", "logps", "losses", "objectives", "weights")
NAMES = sorted(set(re.findall(rf"`(?:score=)?((?:{'|'.join(ROOMS)})\.[\w.]+)`", README)))


def test_the_tables_are_read():
    assert len(NAMES) > 90


@pytest.mark.parametrize("name", NAMES)
def test_a_function_of_the_table_exists_where_the_table_says(name):
    found = importlib.import_module(f"pt_jax.{name.split('.')[0]}")  # and nothing below it
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    assert callable(found)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:tests|experiments|benchmarks)/[\w/.]+)`", README))))
def test_a_file_that_is_named_is_there(path):
    assert (pathlib.Path(__file__).parents[1] / path).exists()
