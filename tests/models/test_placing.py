"""Reading parts of tensors: what is read is what the whole would give, and no more of the file than that."""

import math

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file

from pt_jax.models import placing, tensors


@pytest.fixture
def read(monkeypatch):
    """Bytes that were read, one entry a time."""
    counts, one = [], tensors._read
    monkeypatch.setattr(tensors, "_read", lambda f, begin, data: counts.append(data.nbytes) or one(f, begin, data))
    return counts


def boxes(shape, rng, count=12):
    yield tuple(slice(0, n) for n in shape)
    for _ in range(count):
        yield tuple(slice(a, b) for a, b in (sorted(rng.choice(n + 1, 2, replace=False)) for n in shape))


@pytest.mark.parametrize("page", [1, 4096])  # columns are read apart, and cut out of whole rows
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("on_disk", "shape", "inputs", "first", "turned"),
    [
        ((15, 6), (15, 6), 1, 0, False),  # an embedding
        ((6,), (6,), 0, 0, False),  # a norm
        ((1, 6), (6,), 0, 0, False),  # a head of one output
        ((20, 6), (6, 5, 4), 1, 0, True),  # wq of a Linear
        ((6, 20), (5, 4, 6), 2, 0, True),  # wo
        ((20, 6), (5, 4, 6), 2, 0, False),  # wo of a Conv1D
        ((36, 6), (6, 2, 4), 1, 20, True),  # wk beside wq
        ((6, 36), (6, 2, 4), 1, 20, False),
        ((36,), (2, 4), 0, 20, False),  # its bias
    ],
)
def test_a_part_is_that_of_the_whole(tmp_path, monkeypatch, page, dtype, on_disk, shape, inputs, first, turned):
    monkeypatch.setattr(tensors, "PAGE", page)
    rng = np.random.default_rng(0)
    stored = {"before": rng.normal(size=7).astype(dtype), "x": rng.normal(size=on_disk).astype(dtype)}
    save_file(stored, tmp_path / "x.safetensors")
    leaf = tensors.Leaf(tensors.read_header(tmp_path / "x.safetensors")["x"], shape, inputs, first, turned)
    matrix = stored["x"].reshape(math.prod(shape[:inputs]), -1) if not turned else stored["x"].reshape(
        -1, math.prod(shape[:inputs])).T  # fmt: skip
    whole = matrix[:, first : first + math.prod(shape[inputs:])].reshape(shape)
    np.testing.assert_array_equal(np.asarray(leaf), whole)
    for box in boxes(shape, rng):
        np.testing.assert_array_equal(leaf[box], whole[box])


def test_no_more_is_read_than_what_is_asked_for(tmp_path, read, monkeypatch):
    save_file({"x": np.zeros((64, 2048), np.float32)}, tmp_path / "x.safetensors")
    entry = tensors.read_header(tmp_path / "x.safetensors")["x"]
    linear = tensors.Leaf(entry, (2048, 64), 1, 0, True)
    for box, most in (((slice(0, 2048), slice(8, 16)), 1), ((slice(1024, 2048), slice(0, 64)), 64)):
        read.clear()
        asked = 4 * np.prod([x.stop - x.start for x in box])
        assert linear[box].nbytes == sum(read) == asked and len(read) == most
    read.clear()
    assert linear[0:8, 0:64].nbytes * 256 == sum(read)  # pieces of less than a page are not worth a look each


def test_a_file_that_is_cut_while_it_is_read_is_told(tmp_path):
    save_file({"x": np.zeros((64, 2048), np.float32)}, tmp_path / "x.safetensors")
    entry = tensors.read_header(tmp_path / "x.safetensors")["x"]
    with open(tmp_path / "x.safetensors", "r+b") as f:
        f.truncate(entry.end - 4)
    for leaf in (tensors.Leaf(entry, (64, 2048), 1), tensors.Leaf(entry, (2048, 64), 1, 0, True)):
        with pytest.raises(ValueError, match=r"x\.safetensors: became shorter while it was read; copy or download"):
            leaf[tuple(slice(n // 2, n) for n in leaf.shape)]


@pytest.mark.parametrize("spec", [P(None, "x", "y"), P("y", None, "x"), P(None, None, "y"), P(), P("x", "y")])
def test_of_what_lies_on_other_hosts_nothing_is_looked_at(spec, monkeypatch):
    """A host with two of eight devices: each layer is put, and what is asked of it is what the two will hold."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, spec)
    everywhere = NamedSharding.addressable_devices_indices_map
    places = dict([*everywhere(sharding, (4, 8, 12)).items()][4:6])
    only = lambda self, shape: places if self is sharding else everywhere(self, shape)
    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", only)
    whole, asked = np.random.default_rng(0).normal(size=(4, 8, 12)).astype(np.float32), np.zeros((4, 8, 12), bool)

    class Watched:
        def __init__(self, i):
            self.i = i

        def __getitem__(self, box):
            asked[self.i][box] = True
            return whole[self.i][box]

    filling = placing.Filling((4, 8, 12), np.float32, sharding)
    for i in range(4):
        filling.put(Watched(i), (i,))
    held = np.zeros((4, 8, 12), bool)
    for place in places.values():
        held[place] = True
    np.testing.assert_array_equal(asked, held)
    got = [shard.data for shard in filling.shares.addressable_shards]
    for x, place in zip(got, places.values(), strict=True):
        np.testing.assert_array_equal(x, whole[place])
