"""A folder is there whole or not at all, and whatever goes wrong, nothing that was there before is lost."""

import errno
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest

from pt_jax import folders


def contents(folder):
    """Every file below with its text, hidden ones too: what is left behind shows."""
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def old(tmp_path):
    folder = tmp_path / "model"
    (folder / "deep").mkdir(parents=True)
    (folder / "weights").write_text("old")
    (folder / "deep" / "notes").write_text("old")
    return folder


def test_a_folder_takes_its_name_only_when_it_is_whole(tmp_path):
    path = tmp_path / "made" / "on" / "the" / "way"
    with folders.appear_whole(path) as fresh:
        (fresh / "weights").write_text("new")
        assert not path.exists()
        assert fresh.parent.parent == path.parent  # a rename across file systems would be a copy, which is not whole
    assert contents(tmp_path) == {"made/on/the/way/weights": "new"}
    assert names(path.parent) == ["way"]


def test_a_name_may_be_relative_and_a_string(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with folders.appear_whole("model") as fresh:
        (fresh / "weights").write_text("new")
    assert contents(tmp_path) == {"model/weights": "new"}


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_block_that_fails_leaves_nothing(tmp_path, failure):
    with pytest.raises(failure), folders.appear_whole(tmp_path / "model") as fresh:
        (fresh / "weights").write_text("half")
        raise failure
    assert names(tmp_path) == []


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_block_that_fails_leaves_what_was_there(tmp_path, old, failure):
    before = contents(tmp_path)
    with pytest.raises(failure), folders.appear_whole(old, overwrite=True, keep=["weights"]) as fresh:
        (fresh / "weights").write_text("half")
        raise failure
    assert contents(tmp_path) == before
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_rename_that_fails_leaves_what_was_there(tmp_path, old, monkeypatch, fails_at, failure):
    """At the first one the old folder still has its name, at the second it must get it back."""
    before, rename, calls = contents(tmp_path), pathlib.Path.rename, []

    def failing(self, target):
        calls.append(target)
        if len(calls) == fails_at:
            raise failure
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", failing)
    with pytest.raises(failure), folders.appear_whole(old, overwrite=True) as fresh:
        (fresh / "weights").write_text("new")
    assert contents(tmp_path) == before
    assert names(tmp_path) == ["model"]


def test_a_folder_with_something_in_it_is_not_replaced_unasked(tmp_path, old):
    before = contents(tmp_path)
    with (
        pytest.raises(ValueError, match="model: exists and is not empty; give another folder, or allow"),
        folders.appear_whole(old),
    ):
        pytest.fail("the block ran")
    assert contents(tmp_path) == before


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "model").mkdir()
    with folders.appear_whole(tmp_path / "model") as fresh:
        (fresh / "weights").write_text("new")
    assert contents(tmp_path) == {"model/weights": "new"}


def test_a_replaced_folder_is_whole_until_it_is_replaced_entirely(tmp_path, old):
    with folders.appear_whole(old, overwrite=True) as fresh:
        assert contents(old) == {"weights": "old", "deep/notes": "old"}
        assert names(fresh) == []
        (fresh / "config").write_text("new")
    assert contents(tmp_path) == {"model/config": "new"}
    assert names(tmp_path) == ["model"]


def test_a_replaced_folder_passes_on_what_is_to_be_kept_and_no_more(tmp_path, old):
    with folders.appear_whole(old, overwrite=True, keep=["weights", "not there", "deep"]) as fresh:
        (fresh / "config").write_text("new")
    assert contents(tmp_path) == {"model/config": "new", "model/weights": "old"}


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model").write_text("a file")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="model: is a file; give the name of a folder"):
            folders.check_writable(tmp_path / "model", overwrite=overwrite)


def test_a_place_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(ValueError, match=r"model/0: cannot be written \(.*model: Not a directory\)"):
        folders.check_writable(tmp_path / "model" / "0")


def test_a_disk_that_refuses_is_found_before_the_work(tmp_path, monkeypatch):
    """Tried, not read off permission bits: a full disk and a read-only one refuse root as well."""

    def refuse(dir):
        raise OSError(errno.EROFS, f"Read-only file system: {dir}")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    with (
        pytest.raises(ValueError, match=r"model: cannot be written .*Read-only"),
        folders.appear_whole(tmp_path / "model"),
    ):
        pytest.fail("the block ran")
    assert names(tmp_path) == []


def test_asking_makes_nothing(tmp_path, old):
    before = contents(tmp_path)
    folders.check_writable(tmp_path / "a" / "b" / "c")
    folders.check_writable(old, overwrite=True)
    assert contents(tmp_path) == before
    assert names(tmp_path) == ["model"]


# ---- what processes leave that were killed

KILLED = """
import os, pathlib, signal, sys
from pt_jax import folders

def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)

path, at = pathlib.Path(sys.argv[1]), sys.argv[2]
with folders.appear_whole(path, overwrite=True) as fresh:
    (fresh / "weights").write_text("new")
    if at == "writing":
        killed()
    rename, calls = pathlib.Path.rename, []

    def counted(self, target):
        calls.append(rename(self, target))
        if len(calls) == {"between": 1, "after": 2}[at]:
            killed()

    pathlib.Path.rename = counted
"""


def kill(path, at):
    here = os.environ | {"PYTHONPATH": str(pathlib.Path(folders.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), at], env=here)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize(("at", "left"), [("writing", "old"), ("between", "new"), ("after", "new")])
def test_what_a_killed_process_left_goes_and_nothing_that_was_whole_is_lost(tmp_path, old, at, left):
    kill(old, at)
    assert len(names(tmp_path)) == (1 if at == "between" else 2)
    for _ in range(2):
        folders.tidy(old)
        assert names(tmp_path) == ["model"] and (old / "weights").read_text() == left


def test_the_next_folder_of_that_name_takes_it_away(tmp_path):
    kill(tmp_path / "model", "writing")
    with folders.appear_whole(tmp_path / "model") as fresh:
        assert names(tmp_path) == [fresh.parent.name]
    assert names(tmp_path) == ["model"]


def test_what_a_process_that_lives_is_writing_stays(tmp_path, old):
    with folders.appear_whole(old, overwrite=True) as fresh:
        (fresh / "weights").write_text("new")
        folders.tidy(old)
        assert (fresh / "weights").read_text() == "new"
    assert contents(tmp_path) == {"model/weights": "new"}


def test_what_somebody_else_left_stays(tmp_path, old, monkeypatch):
    """Without our lock in it, of another name, or from another machine, whose locks are not seen here."""
    kill(old, "writing")
    (ours,) = (path for path in tmp_path.iterdir() if path != old)
    shutil.copytree(ours, tmp_path / ".models.x")
    (tmp_path / ".model.notes").mkdir()
    (tmp_path / ".model.notes/diary").write_text("mine")
    monkeypatch.setattr(folders.platform, "node", lambda: "elsewhere")
    folders.tidy(old)
    assert ours.exists()
    monkeypatch.undo()
    folders.tidy(old)
    assert names(tmp_path) == [".model.notes", ".models.x", "model"]


def test_a_file_system_without_locks_is_written_to_all_the_same(tmp_path, old, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folders.fcntl, "flock", none)
    with folders.appear_whole(old, overwrite=True) as fresh:
        (fresh / "weights").write_text("new")
    assert contents(tmp_path) == {"model/weights": "new"}
