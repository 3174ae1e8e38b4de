"""Checkpoints give back what was saved, to the last bit, or say what is wrong with them."""

import os
import pathlib
import shutil
import subprocess
import time
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from pt_jax.training import checkpoints, init_state, manifests, sharding
from pt_jax.training.checkpoints import Checkpoints


class Pair(typing.NamedTuple):
    left: jax.Array
    right: dict | None


def tree(seed=0):
    """Every kind of leaf and of container that a state may have."""
    rng = np.random.default_rng(seed)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(0.1), {"a": True, "b": False}))
    params = {"a": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32), "b": jnp.zeros((0, 3))}
    return {
        "state": init_state(params, optimizer, jax.random.key(seed), averages=params, extra={"beta": 0.25 + seed}),
        "pair": Pair(jnp.asarray(rng.normal(size=3), jnp.bfloat16), {"deep": [jnp.uint8(seed), None]}),
        "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 3),
        "none": None,
        "strange": jnp.asarray([np.nan, -0.0, np.inf, 1e-42]),
    }


def same(a, b):
    """Bit for bit, with types and structure."""
    bits = lambda x: np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype and bits(x).shape == bits(y).shape and bits(x).tobytes() == bits(y).tobytes()
    return True


def save_all(folder, steps, trees=tree, **options):
    with Checkpoints(folder, warn=pytest.fail, **options) as saved:
        for step in steps:
            saved.save(step, trees(step), metrics={"loss": abs(step - 4)}, meta={"note": f"of {step}"})
    return saved


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with checkpoints 1 and 2, not to be changed."""
    return save_all(tmp_path_factory.mktemp("two") / "checkpoints", (1, 2)).folder


@pytest.fixture
def copy(two, tmp_path):
    return shutil.copytree(two, tmp_path / "run with spaces Ω" / "checkpoints")


def test_a_tree_comes_back_as_it_was_and_its_like_is_not_consumed(two):
    like = jax.eval_shape(tree)
    with Checkpoints(two, warn=pytest.fail) as saved:
        assert saved.steps() == [1, 2] and saved.newest() == 2
        assert same(saved.restore(1, like), tree(1)) and same(saved.restore(2, tree(7)), tree(2))
        assert saved.meta(2)["note"] == "of 2" and saved.meta(2)["format"] == 1 and "jax" in saved.meta(2)["versions"]


def test_a_part_comes_back_alone(two):
    part = checkpoints.restore_part(two / "2", {"pair": tree()["pair"]})
    assert same(part, {"pair": tree(2)["pair"]})
    with pytest.raises(ValueError, match="pear is not there"):
        checkpoints.restore_part(two / "2", {"pear": jnp.zeros(())})


def test_the_state_may_be_consumed_while_it_is_written(tmp_path):
    consume = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    state = {"w": jnp.arange(1 << 20, dtype=jnp.float32)}
    with Checkpoints(tmp_path) as saved:
        saved.save(1, state)
        state = jax.block_until_ready(consume(consume(state)))
        saved.wait()
        np.testing.assert_array_equal(saved.restore(1, state)["w"], np.arange(1 << 20))


def test_it_comes_back_onto_another_mesh_and_onto_one_device(tmp_path):
    def on(data, fsdp, tensor):
        mesh = sharding.make_mesh(data, fsdp, tensor)
        return {"w": NamedSharding(mesh, P("fsdp", "tensor")), "n": NamedSharding(mesh, P())}

    x = {"w": jnp.arange(128.0).reshape(8, 16), "n": jnp.int32(3)}
    with Checkpoints(tmp_path) as saved:
        saved.save(1, jax.device_put(x, on(2, 2, 2)))
        saved.wait()
        alone = SingleDeviceSharding(jax.devices()[5])
        for layout in (on(2, 2, 2), on(1, 8, 1), on(1, 2, 4), {"w": alone, "n": alone}):
            like = jax.tree.map(lambda v, where: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=where), x, layout)
            got = saved.restore(1, like)
            assert same(got, x) and all(
                jax.tree.leaves(jax.tree.map(lambda v, where: v.sharding == where, got, layout))
            )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t | {"strange": jnp.zeros(5)}, r"strange is float32\[4\] there and float32\[5\] here"),
        (
            lambda t: t | {"strange": jnp.zeros(4, jnp.bfloat16)},
            r"strange is float32\[4\] there and bfloat16\[4\] here",
        ),
        (
            lambda t: t | {"keys": jax.random.split(jax.random.key(0), 3)},
            r"keys is key<rbg>\[3\] there and key<fry>\[3\]",
        ),
        (lambda t: t | {"more": jnp.zeros(2)}, "more is not there$"),
        (
            lambda t: {k: v for k, v in t.items() if k not in ("keys", "strange")},
            "keys is there and not here, and 1 more",
        ),
    ],
)
def test_another_state_is_refused_in_a_sentence_and_nothing_is_cast(two, change, said):
    with pytest.raises(ValueError, match=rf"{two}/2: is of another state: .*{said}"):
        checkpoints.restore(two / "2", change(tree()))


def test_what_is_kept(tmp_path):
    best = lambda metrics: -metrics["loss"]
    small = lambda step: {"x": jnp.float32(step)}
    assert save_all(tmp_path / "a", range(1, 10), small, keep=2).steps() == [8, 9]
    assert save_all(tmp_path / "b", range(1, 10), small, keep=1, every=3, best=best).steps() == [3, 4, 6, 9]


@pytest.mark.parametrize("gone", range(4))
def test_a_kill_while_an_old_one_is_removed_leaves_nothing_for_good(copy, monkeypatch, gone):
    """Whichever of its files were removed by then: none, some, or only the folders are left."""

    class Killed(BaseException):
        pass

    def remove(path, ignore_errors=False):
        if not path.exists():
            return
        files = sorted(x for x in path.rglob("*") if x.is_file())
        for file in files[: len(files) * gone // 3]:
            file.unlink()
        raise Killed

    with Checkpoints(copy, warn=pytest.fail) as saved:
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(shutil, "rmtree", remove)
            saved.keep = 1
            saved._drop()
        assert saved.steps() in ([1, 2], [2]) and saved.newest() == 2
        saved.go_on_from(2)
        saved.save(3, tree(3), wait=True)
    assert [x.name for x in copy.iterdir()] == ["3"]


@pytest.mark.parametrize("how", ["removed", "renamed"])
def test_an_old_one_that_cannot_go_fails_no_save_and_is_told_once(tmp_path, monkeypatch, how):
    """As on NFS, where a file that somebody has open stays in its folder under another name."""
    told, remove, rename = [], shutil.rmtree, pathlib.Path.rename

    def held(path, *given, **more):
        return None if str(path).endswith(".removed") else remove(path, *given, **more)

    def refused(path, to):
        if str(to).endswith(".removed"):
            raise PermissionError(13, "Permission denied")
        return rename(path, to)

    folder = tmp_path / "run"
    with Checkpoints(folder, keep=1, failed=lambda said: pytest.fail(said), warn=told.append) as saved:
        with monkeypatch.context() as patched:
            if how == "removed":
                patched.setattr(shutil, "rmtree", held)
            else:
                patched.setattr(pathlib.Path, "rename", refused)
            for step in (1, 2, 3, 4):
                saved.save(step, {"x": jnp.ones(3)}, wait=True)
            if how == "removed":  # whose names are taken when they come again
                (folder / "2.removed").rename(folder / "4.removed")
                saved.save(5, {"x": jnp.ones(3)}, wait=True)
                assert (folder / "4.1.removed").is_dir()
        saved.save(6, {"x": jnp.ones(3)}, wait=True)
        assert saved.steps() == [6]
    assert sorted(p.name for p in folder.iterdir()) == ["6"]
    names = [said.partition(" is not needed any more and could not be removed")[0] for said in told]
    stuck = {"removed": ("1.removed", "2.removed", "3.removed", "4.removed"), "renamed": ("1", "2", "3")}[how]
    assert sorted(names) == [str(folder / name) for name in stuck]
    assert how == "removed" or all("(Permission denied); it takes room" in said for said in told)


def test_a_damaged_note_of_an_old_one_does_not_fail_the_save_of_a_new_one(copy):
    (copy / "1/meta.json").write_text("{")
    with Checkpoints(copy, best=lambda metrics: -metrics["loss"], keep=1, warn=pytest.fail) as saved:
        saved.save(3, tree(3), metrics={"loss": 9.0}, wait=True)
        assert saved.steps() == [2, 3]


@pytest.mark.parametrize("how", ["delete", "cut", "flip", "zero"])
def test_every_damaged_file_is_named_and_the_one_before_is_used(two, copy, how):
    names = sorted(p.relative_to(two / "2").as_posix() for p in (two / "2").rglob("*") if p.is_file())
    assert len(names) > 8
    for name in names:
        path = copy / "2" / name
        if not damage(path, how):
            continue
        said = []
        with Checkpoints(copy, warn=said.append) as saved:
            assert saved.newest() == 1, name
        assert len(said) == 1 and name in said[0] and str(copy / "2") in said[0]
        shutil.copy2(two / "2" / name, path)
    with Checkpoints(copy, warn=pytest.fail) as saved:
        assert saved.newest() == 2


def damage(path, how):
    """Whether there was anything to damage."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if how == "delete":
        path.unlink()
        return True
    if not content:
        return False
    if how == "cut":
        del content[middle:]
    elif how == "flip":
        content[middle] ^= 1
    else:
        content[middle : middle + 64] = bytes(len(content[middle : middle + 64]))
    changed = content != path.read_bytes()
    path.write_bytes(content)
    return changed


def test_when_all_are_damaged_it_says_so(copy):
    for step in (1, 2):
        (copy / str(step) / "meta.json").write_text("{}")
    said = []
    with (
        Checkpoints(copy, warn=said.append) as saved,
        pytest.raises(ValueError, match="no checkpoint is whole, each of 1, 2"),
    ):
        saved.newest()
    assert [("meta.json has 2 bytes" in s) for s in said] == [True, True]


def test_what_is_no_checkpoint_is_not_used_and_stays_unless_it_was_begun_here(copy):
    (copy / "9").mkdir()
    (copy / "8").mkdir()
    (copy / "8/notes.txt").write_text("mine")
    (copy / "notes.txt").write_text("mine")
    shutil.copytree(copy / "2", copy / "7")
    (copy / "7" / manifests.NAME).unlink()  # as an interrupted copy, or a run that was killed before the last file
    said = []
    with Checkpoints(copy, warn=said.append) as saved:
        assert saved.newest() == 2
        saved.go_on_from(2)
        assert sorted(p.name for p in copy.iterdir()) == ["1", "2", "8", "notes.txt"]
        saved.save(3, tree(3))
    assert [next(n for n in ("7", "8", "9", "notes.txt") if f"/{n} is" in s) for s in said] == [
        "7",
        "8",
        "9",
        "notes.txt",
    ]
    assert checkpoints.complete(copy) == [1, 2, 3]


def test_going_on_from_an_earlier_one_makes_room_and_keeps_what_is_damaged(copy):
    with Checkpoints(copy, warn=lambda _: None) as saved:
        saved.save(3, tree(3))
        saved.wait()
        (copy / "3/meta.json").write_text("{}")
        assert saved.newest() == 2
        saved.go_on_from(1)
        assert sorted(p.name for p in copy.iterdir()) == ["1", "3.damaged"]
        saved.save(2, tree(5))
        saved.wait()
        assert same(saved.restore(2, tree()), tree(5)) and saved.newest() == 2


def test_a_step_that_is_there_is_not_saved_again_in_silence(copy):
    with Checkpoints(copy) as saved, pytest.raises(OSError, match=rf"checkpoint {copy}/2 was not written"):
        saved.save(2, tree(9))
    assert same(checkpoints.restore(copy / "2", tree()), tree(2))


def test_a_later_format_is_refused(copy):
    about = (copy / "2/meta.json").read_text()
    (copy / "2/meta.json").write_text(about.replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="has format 2, this version reads up to 1; update"):
        checkpoints.restore(copy / "2", tree())
    with pytest.raises(ValueError, match="is no checkpoint"):
        checkpoints.read_meta(copy)


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_a_block_that_ends_in_any_way_waits_for_its_checkpoint(tmp_path, end):
    with pytest.raises(end), Checkpoints(tmp_path) as saved:
        saved.save(1, tree(1))
        raise end
    assert same(checkpoints.restore(tmp_path / "1", tree()), tree(1)) and saved.newest() == 1


def test_two_leaves_of_one_name_are_refused(tmp_path):
    with Checkpoints(tmp_path) as saved, pytest.raises(ValueError, match=r"two leaves of the tree are called a\.b"):
        saved.save(1, {"a.b": jnp.zeros(()), "a": {"b": jnp.zeros(())}})


def test_a_relative_folder_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints("here/checkpoints") as saved:
        (tmp_path / "else").mkdir()
        os.chdir(tmp_path / "else")
        saved.save(1, {"x": jnp.ones(2)})
    assert checkpoints.complete(tmp_path / "here/checkpoints") == [1]


def test_a_clock_that_jumps_back_changes_nothing(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=2, warn=pytest.fail) as saved:
        for step, now in ((1, 4e9), (2, 1e9), (3, 2e9)):
            monkeypatch.setattr(time, "time", lambda now=now: now)
            saved.save(step, {"x": jnp.float32(step)}, wait=True)  # a jump during a save is a failed save
        assert saved.steps() == [2, 3] and saved.newest() == 3


@pytest.mark.parametrize("keep", [0, -1])
def test_keeping_none_is_refused(tmp_path, keep):
    with pytest.raises(ValueError, match=f"keep must be above 0, got {keep}"):
        Checkpoints(tmp_path, keep=keep)


def test_a_folder_that_cannot_be_written_is_told_at_the_start(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cannot be written"), Checkpoints(tmp_path / "file" / "checkpoints"):
        pytest.fail("it was entered")


@pytest.fixture
def small_disk(tmp_path):
    """Six megabytes that are not the machine's, where it lets us have them."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(path)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("this needs the right to mount")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def megabytes(n):
    return {"x": jnp.asarray(np.random.default_rng(0).normal(size=n << 17))}  # float32 here: half a megabyte each


def test_a_disk_that_is_read_only_is_told_at_the_start(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ValueError, match=r"cannot be written .*Read-only file system"), Checkpoints(small_disk / "run"):
        pytest.fail("it was entered")


@pytest.mark.parametrize("wait", [True, False])
def test_a_full_disk_is_told_once_with_path_and_bytes_and_costs_no_earlier_checkpoint(small_disk, wait, capfd):
    folder, told = small_disk / "checkpoints", []
    with Checkpoints(folder, failed=told.append, warn=pytest.fail) as saved:
        saved.save(1, megabytes(2), wait=True)
        saved.save(2, megabytes(30), wait=wait)
        saved.wait()
        assert len(told) == 1 and f"checkpoint {folder}/2 was not written" in told[0] and "15,728,640 bytes" in told[0]
        assert sorted(p.name for p in folder.iterdir()) == ["1"] and saved.newest() == 1
        saved.save(3, megabytes(3))  # there is room again, and training went on
    assert checkpoints.complete(folder) == [1, 3] and len(told) == 1
    same(checkpoints.restore(folder / "1", megabytes(2)), megabytes(2))
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_save_that_fails_in_the_background_is_told_at_the_next_occasion(tmp_path, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    with Checkpoints(tmp_path) as saved:
        saved.save(1, tree(1), wait=True)
        with monkeypatch.context() as broken:
            broken.setattr(manifests, "write", full)
            saved.save(2, tree(2))
            while saved._thread.is_alive():
                time.sleep(0.01)
        with pytest.raises(OSError, match=r"/2 was not written: No space left on device; it takes .* bytes"):
            saved.poll()
        saved.poll()
        saved.save(2, tree(3))
    assert checkpoints.complete(tmp_path) == [1, 2]
    assert same(checkpoints.restore(tmp_path / "2", tree()), tree(3))
