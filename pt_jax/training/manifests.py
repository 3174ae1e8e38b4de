"""Checksums of a folder's files: what was written is what is read.

A store of arrays gives back flipped bytes without a word. ``write`` notes the size and the xxh3-128 of every file;
``faults`` says which files are no longer what they were.
"""

import json
import os
import pathlib

import xxhash

NAME = "MANIFEST.json"
_CHUNK = 1 << 22


def write(folder) -> None:
    """Notes every file of a folder, those of its folders too, in ``MANIFEST.json``, which appears whole.

    Args:
      folder: that nobody writes to any more.
    """
    folder = pathlib.Path(folder)
    noted = {name: {"bytes": path.stat().st_size, "xxh3_128": digest(path)} for name, path in _files(folder).items()}
    fresh = folder / f".{NAME}.new"
    with open(fresh, "w") as file:
        json.dump({"files": noted, "xxh3_128": _own(noted)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(folder / NAME)


def faults(folder) -> list[str]:
    """What is wrong with a folder's files, each in words that begin with the file's name; empty when all are whole.

    Args:
      folder: with the manifest that ``write`` left. A file that is not in it is not looked at.
    """
    folder = pathlib.Path(folder)
    try:
        manifest = json.loads((folder / NAME).read_text())
        if _own(manifest["files"]) != manifest["xxh3_128"]:
            return [f"{NAME} has other bytes than were written"]
        wanted = {name: (entry["bytes"], entry["xxh3_128"]) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        return [f"{NAME} is missing"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return [f"{NAME} cannot be read ({type(e).__name__}: {e})"]
    there = _files(folder)
    return [
        f"{name} {fault}" for name, entry in wanted.items() if (fault := _fault(there.get(name), *entry)) is not None
    ]


def _own(files) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(files, sort_keys=True).encode())


def _fault(path, size, checksum):
    if path is None:
        return "is missing"
    try:
        if (found := path.stat().st_size) != size:
            return f"has {found} bytes, not {size}"
        return None if digest(path) == checksum else "has other bytes than were written"
    except OSError as e:
        return f"cannot be read ({e.strerror})"


def _files(folder) -> dict[str, pathlib.Path]:
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if path.name not in (NAME, f".{NAME}.new")}


def digest(path) -> str:
    """The xxh3-128 of a file, as hex."""
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()
