"""Folders that appear whole or not at all."""

import contextlib
import glob
import os
import pathlib
import platform
import shutil
import tempfile

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = "pt_jax.lock"  # held by the process that writes a folder


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
    tidy(path)
    check_writable(path, overwrite=overwrite, keep=keep)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    fresh, old = aside / "new", aside / "old"
    fresh.mkdir()
    with _held(aside):
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


@contextlib.contextmanager
def _held(aside):
    """While the block runs, a lock says that somebody is at work in a folder; it goes with the process."""
    if fcntl is None:
        yield
        return
    with open(aside / f"{LOCK}.new", "w") as lock:
        with contextlib.suppress(OSError):  # of a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.write(platform.node())
            lock.flush()
            os.replace(aside / f"{LOCK}.new", aside / LOCK)  # whoever sees it sees it locked
        yield


def tidy(path) -> None:
    """Removes what processes that were killed within ``appear_whole(path)`` have left beside ``path``.

    Where one was killed between its two renames, the new folder, which was whole, gets the name. What a process that
    lives is writing stays, as does all that was not left by ``appear_whole`` on this machine.
    """
    path = pathlib.Path(path).resolve()
    for aside in path.parent.glob(f".{glob.escape(path.name)}.*") if fcntl is not None else ():
        with contextlib.suppress(OSError), open(aside / LOCK, "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process lives
            if lock.read() != platform.node():
                continue
            if (aside / "old").exists() and (aside / "new").exists() and not path.exists():
                (aside / "new").rename(path)
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
