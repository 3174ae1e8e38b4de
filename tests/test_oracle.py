"""Every recorded case of TRL, value and gradient, through our functions."""

import copy
import json
import os
import pathlib

import numpy as np
import pytest
from oracle import replay

REFERENCE = pathlib.Path(__file__).parent / "reference"
ENTRIES = json.loads((REFERENCE / "trl_1_16.json").read_text())["entries"]
ARRAYS = np.load(REFERENCE / "trl_1_16.npz")


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e["name"])
def test_trl_gets_the_same(entry):
    got = replay(entry | {"name": "a name says nothing"}, ARRAYS)
    assert got.keys() == entry["outputs"].keys()
    for name, key in entry["outputs"].items():
        expected = ARRAYS[key]
        # Of advantages that are whitened to a mean of 0 the loss of a policy is a remainder: a rounding of a return of
        # 4 is 5e-7 and moves it by as much, and which way it is rounded is the compiler's:
        # with all its optimisations (``conftest``) as TRL's.
        size = 0.1 if name == "pg_loss" and os.environ["XLA_FLAGS"] else 1e-2
        np.testing.assert_allclose(
            got[name], expected, rtol=1e-5, atol=1e-5 * max(size, np.abs(expected).max()), err_msg=name
        )


@pytest.mark.parametrize("family", sorted({e["family"] for e in ENTRIES}))
def test_an_option_that_is_not_known_is_refused(family):
    entry = copy.deepcopy(next(e for e in ENTRIES if e["family"] == family))
    entry["options"]["squared"] = True
    with pytest.raises(ValueError, match="squared"):
        replay(entry, ARRAYS)


def test_a_family_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="alchemy"):
        replay(ENTRIES[0] | {"family": "alchemy"}, ARRAYS)
