"""Folders that appear whole or not at all."""

import contextlib
import pathlib
import shutil
import tempfile


@contextlib.contextmanager
def appear_whole(path, *, overwrite=False, keep=()):
    """A fresh folder beside ``path`` to write into; it takes the name when the block ends without an error.

    What stood there before is removed only after the new folder has the name. A block that fails leaves what stood
    there as it was.

    Args:
      path: the folder to make.
      overwrite: whether an existing folder that is not empty may be replaced.
      keep: names of files that a replaced folder passes on, unless the block wrote them itself. A folder of nothing
        but these may be replaced too.

    Raises:
      ValueError: the folder exists and may not be replaced, or its place cannot be written.
    """
    path = pathlib.Path(path).resolve()  # of a link, the folder that it stands for
    check_writable(path, overwrite=overwrite, keep=keep)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    fresh, old = aside / "new", aside / "old"
    fresh.mkdir()
    try:
        yield fresh
        for name in keep:
            if (path / name).is_file() and not (fresh / name).exists():
                shutil.copy2(path / name, fresh / name)
        if path.exists():
            path.rename(old)
        fresh.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_writable(path, *, overwrite=False, keep=()) -> None:
    """Fails with a sentence unless ``appear_whole`` could make ``path``; called before long work starts."""
    path = pathlib.Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: is a file; give the name of a folder")
    if path.is_dir() and not overwrite and {p.name for p in path.iterdir()} - set(keep):
        raise ValueError(f"{path}: exists and is not empty; give another folder, or allow it to be replaced")
    if path.is_mount():
        raise ValueError(f"{path}: is a mount point and cannot be replaced; give a folder inside it")
    parent = next(p for p in path.parents if p.exists())
    try:  # permission bits do not tell: a read-only file system and a full disk refuse root as well
        with tempfile.TemporaryDirectory(dir=parent):
            pass
    except OSError as e:
        raise ValueError(f"{path}: cannot be written ({parent}: {e.strerror}); give a folder of your own") from e
