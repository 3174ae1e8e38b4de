"""Safetensors files, read and written one tensor at a time.

A file is 8 bytes, the length n of the header; n bytes of JSON, {name: {"dtype", "shape", "data_offsets"}}; and the
numbers, one tensor behind the other. The safetensors library maps a whole file into memory to read it, and wants all of
its tensors at once to write it. Here no more than one tensor is in memory, and its header tells all but the numbers.
"""

import dataclasses
import json
import math
import pathlib
import re
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(bias|masked_bias)$")  # in old files, beside the weights
SHARD = 5 * 2**30  # bytes of a file
CHUNK = 2**24  # bytes that are compared at once
PAGE = 2**12  # bytes that a disk reads at once, at the least


class Entry(NamedTuple):
    """A tensor of a file.

    Args:
      file: its path.
      dtype: as the file calls it: "BF16".
      shape: its axes.
      begin, end: bytes of the file.
    """

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Tensors:
    """The tensors of a folder by name; the numbers of one are read when it is taken.

    Args:
      folder: with model.safetensors, or model.safetensors.index.json and the files that it names.
      ignored: names that are passed over, as a regular expression, or None.

    Raises:
      ValueError: a file is missing, cut off or no safetensors file, or the index and the files disagree.
    """

    def __init__(self, folder, ignored=None):
        self.folder, self.where, self.prefix = folder, {}, ""
        files, index = _files(folder)
        for file in files:
            for name, entry in read_header(file).items():
                if name in self.where:
                    raise ValueError(f"{file}: {name} is in {self.where[name].file.name} as well; one of them is old")
                self.where[name] = entry
        for name, file in index.items():
            if name not in self.where or self.where[name].file.name != file:
                raise ValueError(f"{folder / file}: lacks the tensor {name}, which the index says is in it")
        passed_over = [BUFFERS] if ignored is None else [BUFFERS, re.compile(ignored)]
        self.left = {name for name in self.where if not any(p.search(name) for p in passed_over)}

    def prefixed(self, name):
        """Files of the base model alone leave out the first word of every name: GPT-2 on the hub."""
        first, rest = name.split(".", 1)
        if name not in self.where and rest in self.where:
            self.prefix = f"{first}."

    def __contains__(self, name):
        return name.removeprefix(self.prefix) in self.where

    def check(self, name, shape) -> Entry:
        """The entry of a tensor, which must have this shape; from now on it is not left over."""
        name = name.removeprefix(self.prefix)
        if name not in self.where:
            raise ValueError(f"{self.folder}: the weights lack the tensor {name}")
        entry = self.where[name]
        if entry.dtype not in DTYPES:
            raise ValueError(
                f"{entry.file}: {name} is of type {entry.dtype}, which no weight here is; give it as one of "
                f"{', '.join(DTYPES)}"
            )
        if entry.shape != tuple(shape):
            raise ValueError(f"{entry.file}: {name} has shape {entry.shape}, config.json asks for {tuple(shape)}")
        self.left.discard(name)
        return entry

    def same(self, one, other) -> bool:
        """Whether two tensors hold the same bytes, compared piece by piece."""
        a, b = (self.where.get(name.removeprefix(self.prefix)) for name in (one, other))
        if a is None or b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        steps = range(0, a.end - a.begin, CHUNK)
        pieces = ((_numbers(x, x.begin + i, min(x.begin + i + CHUNK, x.end)) for x in (a, b)) for i in steps)
        return all(np.array_equal(*pair) for pair in pieces)

    def all_taken(self):
        """Fails when a tensor is left over."""
        if self.left:
            extra = sorted(self.left)
            file = self.where[extra[0]].file
            raise ValueError(f"{file}: unexpected tensor {extra[0]} (and {len(extra) - 1} more); this family has none")


def read_header(file) -> dict[str, Entry]:
    """The tensors of a file, without their numbers.

    Raises:
      ValueError: the file is cut off, or is no safetensors file; the message names the first tensor that is not whole.
    """
    bad = lambda why: ValueError(f"{file}: cannot be read ({why}); copy or download it again")
    try:
        size = file.stat().st_size
        with open(file, "rb") as f:
            start = f.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if 8 + length > size:
                raise bad("it ends within its header")
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        first = 8 + length
        entries = {
            name: Entry(file, x["dtype"], tuple(x["shape"]), *(first + i for i in x["data_offsets"]))
            for name, x in header.items()
        }
        if why := _torn(entries, first, size):
            raise bad(why)
    except OSError as e:
        raise bad(e) from e
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as e:
        raise bad("its header is not that of a safetensors file") from e
    return entries


def _torn(entries, at, size):
    """What is wrong with where the tensors are; they fill a file without gaps."""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.end > size:
            return f"{name} goes from byte {entry.begin:,} to {entry.end:,}, and the file ends at {size:,}"
        if not at == entry.begin <= entry.end:
            return f"{name} goes from byte {entry.begin:,} to {entry.end:,}, and the one before it ends at {at:,}"
        width = np.dtype(DTYPES[entry.dtype]).itemsize if entry.dtype in DTYPES else None
        if width and entry.end - entry.begin != width * math.prod(entry.shape):
            return f"{name} has {entry.end - entry.begin:,} bytes for the shape {entry.shape}"
        at = entry.end
    return None if at == size else "it goes on behind its last tensor"


def numbers(entry: Entry) -> np.ndarray:
    """A tensor's numbers."""
    return _numbers(entry, entry.begin, entry.end).view(DTYPES[entry.dtype]).reshape(entry.shape)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array that is a tensor, or a part of one: indexed by a slice of each axis, it reads these numbers alone.

    The tensor is taken for a matrix, inputs times outputs, of which the leaf is some columns.

    Args:
      entry: the tensor.
      shape: of the array.
      inputs: how many of its leading axes are the rows of the matrix; the others are columns.
      first: its first column.
      turned: whether the file has the outputs first.
    """

    entry: Entry
    shape: tuple[int, ...]
    inputs: int
    first: int = 0
    turned: bool = False

    def __getitem__(self, index):
        rows = _flat(index[: self.inputs], self.shape[: self.inputs])
        columns = _flat(index[self.inputs :], self.shape[self.inputs :])
        columns = range(self.first + columns.start, self.first + columns.stop)
        found = _matrix(self.entry, columns, rows).T if self.turned else _matrix(self.entry, rows, columns)
        first = (0, self.inputs)  # the axes of which no more than that is read
        axes = enumerate(zip(index, self.shape))
        found = found.reshape([len(range(n)[x]) if i in first else n for i, (x, n) in axes])
        return found[tuple(slice(None) if i in first else x for i, x in enumerate(index))]

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self[tuple(slice(n) for n in self.shape)], dtype)


def _flat(index, shape) -> range:
    """What a slice of the first of some axes is when they are one; whatever the slices of the others leave out."""
    if not shape:
        return range(1)
    of_first, inner = range(shape[0])[index[0]], math.prod(shape[1:])
    return range(of_first.start * inner, of_first.stop * inner)


def _matrix(entry, rows, columns):
    """Rows and columns of a tensor that is taken for a matrix.

    Parts of rows are read one by one where each is a page of memory or more: of less, a disk reads what is between them
    as well.
    """
    whole, dtype = entry.shape[-1], np.dtype(DTYPES[entry.dtype])
    at = lambda row, column: entry.begin + (row * whole + column) * dtype.itemsize
    if len(columns) == whole or len(columns) * dtype.itemsize < PAGE:
        found = _numbers(entry, at(rows.start, 0), at(rows.stop, 0)).view(dtype).reshape(len(rows), whole)
        return found[:, columns.start : columns.stop]
    found = np.empty((len(rows), len(columns)), dtype)
    with open(entry.file, "rb", buffering=0) as f:
        for row, part in zip(rows, found.view(np.uint8)):
            _read(f, at(row, columns.start), part)
    return found


def _numbers(entry, begin, end):
    """Some bytes of a file. They are not mapped: mapped pages stay in memory until others need the room."""
    data = np.empty(end - begin, np.uint8)
    with open(entry.file, "rb", buffering=0) as f:
        _read(f, begin, data)
    return data


def _read(f, begin, data):
    """Fills an array of bytes from a file, which gives 2 GiB at a time at the most."""
    f.seek(begin)
    left = memoryview(data)
    while left:
        if not (count := f.readinto(left)):
            raise ValueError(f"{f.name}: became shorter while it was read; copy or download it again")
        left = left[count:]


def _files(folder):
    """The files of the weights, and what the index says of them: name -> file."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole], {}
    if not index.is_file():
        raise ValueError(f"{folder}: has neither model.safetensors nor model.safetensors.index.json")
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{index}: lacks weight_map, from tensors to files")
    for name, file in places.items():
        if pathlib.Path(file).name != file or not (folder / file).is_file():
            raise ValueError(f"{folder}: {index.name} names {file} for {name}, which is not there")
    return [folder / file for file in sorted(set(places.values()))], places


def read_json(file) -> dict:
    """The object in a JSON file."""
    try:
        found = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{file}: is not JSON ({e})") from e
    if not isinstance(found, dict):
        raise ValueError(f"{file}: holds {type(found).__name__}, not an object")
    return found


# ---- writing


class Made(NamedTuple):
    """A tensor that is to be written: all but its numbers, which are made when it is its turn."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    numbers: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(folder, made, shard=None) -> None:
    """Writes tensors into one file, or into several with an index; each is read back and compared.

    Args:
      folder: that is there.
      made: all tensors, in order.
      shard: bytes of a file; a tensor that is larger has one of its own. ``SHARD`` when None.

    Raises:
      OSError: a file cannot be written, or does not read back as it was written.
    """
    files, size = [[]], 0
    for tensor in made:
        if files[-1] and size + tensor.size > (SHARD if shard is None else shard):
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.size
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
        index = {"metadata": {"total_size": sum(tensor.size for held in files for tensor in held)}}
        index["weight_map"] = {tensor.name: file for file, held in zip(names, files) for tensor in held}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for file, held in zip(names, files):
        write_file(folder / file, held)


def write_file(file, made) -> None:
    """One file of these tensors; see ``write``."""
    # the widest numbers first, so that each lies at a multiple of its width
    made = sorted(made, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    header, sums, at = {"__metadata__": {"format": "pt"}}, {}, 0
    for name, shape, dtype, _ in made:
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for tensor in made:
            data = np.ascontiguousarray(tensor.numbers()).reshape(-1).view(np.uint8)
            if len(data) != tensor.size:
                raise ValueError(
                    f"{tensor.name} has {len(data)} bytes, its shape {tensor.shape} asks for {tensor.size}"
                )
            sums[tensor.name] = zlib.crc32(data)
            f.write(data)
    for name, entry in read_header(file).items():
        found = 0
        for begin in range(entry.begin, entry.end, CHUNK):
            found = zlib.crc32(_numbers(entry, begin, min(begin + CHUNK, entry.end)), found)
        if found != sums[name]:
            raise OSError(f"{file}: {name} did not read back as it was written; do not trust this disk")
