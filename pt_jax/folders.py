"""Folders that appear whole or not at all."""

import contextlib
import os
import pathlib
import shutil
import tempfile


@contextlib.contextmanager
def appear_whole(path, *, overwrite=False, keep=()):
    """A fresh folder beside ``path`` to write into; it takes the name when the block ends without an error.

    What stood there before is removed only after the new folder has the name, and a block that fails leaves
    everything as it was.

    Args:
      path: the folder to make.
      overwrite: whether an existing folder that is not empty may be replaced.
      keep: names of files that a replaced folder passes on.

    Raises:
      ValueError: the folder exists and may not be replaced, or its place cannot be written.
    """
    path = pathlib.Path(path)
    check_writable(path, overwrite=overwrite)
    fresh, old = (path.with_name(f".{path.name}.{what}-{os.getpid()}") for what in ("new", "old"))
    fresh.mkdir(parents=True)
    try:
        yield fresh
        for name in keep:
            if (path / name).is_file():
                shutil.copy2(path / name, fresh / name)
        if path.exists():
            path.rename(old)
        fresh.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def check_writable(path, *, overwrite=False):
    """Fails with a sentence unless a folder can be made at ``path``; called before long work starts."""
    path = pathlib.Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: is a file; give the name of a folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ValueError(f"{path}: exists and is not empty; give another folder, or allow it to be replaced")
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    try:  # permission bits do not tell: a read-only file system and a full disk refuse root as well
        with tempfile.TemporaryDirectory(dir=parent):
            pass
    except OSError as e:
        raise ValueError(f"{path}: cannot be written ({parent}: {e.strerror}); give a folder of your own") from e
