"""A folder that is not there yet, and a model as it is after a download."""

import pytest
from model_folders import write

from pt_jax.models import load


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "model"


@pytest.fixture
def model(tmp_path):
    return load(write(tmp_path / "downloaded"))
