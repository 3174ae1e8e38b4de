"""The README names only what exists, and its code runs."""

import importlib
import pathlib
import re

import jax
import pytest

from pt_jax import models

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


def test_the_code_runs_as_written(tmp_path, monkeypatch):
    """In a folder where the quickstart has been."""
    monkeypatch.chdir(tmp_path)
    config = models.Config(vocab=40, layers=2, width=16, heads=4, kv_heads=2, head_width=4, hidden=32)
    models.save("runs/quickstart/base", models.init(config, jax.random.key(0)), config)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(compile(code, "README.md", "exec"), names)
    assert names["metrics"]["loss"] > 0 and (tmp_path / "runs" / "adapter" / "adapter_config.json").is_file()
