"""Checkpoints of a run's whole state: written while training goes on, checked before they are believed.

A folder of checkpoints has one folder a step, written by Orbax. Beside the arrays it holds ``meta.json`` (versions,
what the arrays are, whatever the caller adds) and, last of all, ``MANIFEST.json`` with the checksums of every file. A
checkpoint is complete when that is there; anything else is what a killed run or a broken copy left.
"""

import errno
import itertools
import json
import logging
import math
import os
import pathlib
import shutil
import threading
import warnings
from importlib import metadata

import jax
import numpy as np

from pt_jax import checks, folders
from pt_jax.training import distributed, manifests, specs

FORMAT = 1  # of a checkpoint's folder; a change that this code could not read gets a new number
META = "meta.json"
_ARRAYS, _BEGUN = "default", "_CHECKPOINT_METADATA"  # Orbax's names
# Seconds in which a checkpoint is written, and in which all hear that it was not
_COMMITTED, _COME = 1200, 120
_REMOVED, _DAMAGED = ".removed", ".damaged"  # of folders that are no checkpoint any more


class Checkpoints:
    """The checkpoints of one run; a context manager, because a program that ends without it loses the last one.

    Args:
      folder: of the checkpoints; made by the first of them.
      keep: how many of the newest are kept.
      every: those of steps that this number divides are kept as well.
      best: ``metrics -> number``, larger is better: the best one is kept as well.
      failed: called with a sentence when a checkpoint could not be written, and training goes on; None raises it as
        OSError. The failure of a save that went on in the background is told at the next ``save``, ``poll`` or exit; of
        several processes, to all of them, and not by ``poll``, to which they do not come together.
      warn: called with a sentence of each thing in the folder that is no whole checkpoint.

    Raises:
      ValueError: when entered, the folder cannot be written.
    """

    def __init__(self, folder, *, keep=3, every=None, best=None, failed=None, warn=warnings.warn):
        checks.positive("keep", keep)
        checks.positive("every", 1 if every is None else every)
        self.folder = pathlib.Path(folder).resolve()
        self.keep, self.every, self.best, self.failed, self.warn = keep, every, best, failed, warn
        self._manager, self._together, self._thread, self._trouble, self._damaged = None, None, None, None, set()
        self._notes, self._stuck = [], set()  # of what could not be removed

    def __enter__(self):
        folders.check_writable(self.folder / "probe")
        self._level = logging.getLogger("absl").level
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # a failure is told once, in a sentence
        return self

    def __exit__(self, *error):
        try:
            self.wait()
        finally:
            self._close()
            logging.getLogger("absl").setLevel(self._level)

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, in order; warns of everything else in the folder."""
        return complete(self.folder, self.warn)

    def newest(self) -> int | None:
        """The newest step whose files are what was written; None when no checkpoint is complete.

        Raises:
          ValueError: there are complete ones, and each is damaged.
        """
        found = self.steps()
        for step in reversed(found):
            faults = manifests.faults(self.folder / str(step))
            if not faults:
                return step
            self._damaged.add(step)
            self.warn(f"{self.folder / str(step)} is damaged: {_several(faults)}; it is not used")
        if found:
            raise ValueError(
                f"{self.folder}: no checkpoint is whole, each of {', '.join(map(str, found))} is damaged; begin anew, "
                "or put back the files from a copy"
            )
        return None

    def restore(self, step: int, like):
        """The state of a step; see ``restore``."""
        return restore(self.folder / str(step), like)

    def meta(self, step: int) -> dict:
        """What was noted beside a state; see ``read_meta``."""
        return read_meta(self.folder / str(step))

    def go_on_from(self, step: int) -> None:
        """Makes room for the checkpoints after ``step``: later ones are removed, damaged ones and torn ones set aside.

        A damaged one is renamed to STEP.damaged; what a killed run had begun is removed.
        """
        self.wait()
        self._close()  # Orbax remembers what there was
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if path.suffix == _REMOVED:
                shutil.rmtree(path, ignore_errors=True)
            if not _is_step(path):
                continue
            if int(path.name) in self._damaged:
                path.rename(_free(path, _DAMAGED))
            elif int(path.name) > step if _is_complete(path) else (path / _BEGUN).exists() or not any(path.iterdir()):
                _remove(path)

    def save(self, step: int, state, *, metrics=None, meta=None, wait=False) -> None:
        """Copies the state and writes it in the background; the state may be consumed at once.

        Args:
          step: number of the checkpoint; there is none of it yet.
          state: any tree of arrays, keys too, wherever they lie.
          metrics: name to number, for ``best``.
          meta: what JSON can say, noted beside it.
          wait: until it is written.
        """
        import orbax.checkpoint as ocp

        self.wait()
        leaves = {name: x for name, x in specs.flat(state).items() if np.size(x)}  # Orbax has no empty arrays
        versions = {name: metadata.version(name) for name in ("pt_jax", "jax", "orbax-checkpoint")}
        about = {"format": FORMAT, "step": step, "versions": versions, "metrics": dict(metrics or {})}
        about |= {"spec": specs.spec(state)} | (meta or {})
        size = sum(x.size * x.dtype.itemsize for x in map(_array, leaves.values()))
        if self.best is not None:
            self.best(about["metrics"])  # fails here and not in the background
        try:
            if self._manager is None:
                self._together = _Together()
                self._manager = _manager(self.folder, self._together)
            if not self._manager.save(step, args=ocp.args.PyTreeSave(leaves), force=True):
                raise OSError("Orbax refused to save it")
        except Exception as e:
            self._complete(step, about, size, e)
            return self.wait()
        self._thread = threading.Thread(target=self._complete, args=(step, about, size))
        self._thread.start()
        return self.wait() if wait else None

    def poll(self) -> None:
        """Tells of a save that has failed meanwhile; it does not wait."""
        if jax.process_count() == 1 and self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until the last save is complete."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        while self._notes:
            self.warn(self._notes.pop(0))
        if self._trouble is not None:
            trouble, self._trouble = self._trouble, None
            self._tell(*trouble)

    def _complete(self, step, about, size, error=None):
        """In a thread of its own: once Orbax has committed, notes and checksums; then old ones go.

        All processes come here, whether they have written their part or not (``error``), and leave with one outcome.
        """
        path = self.folder / str(step)
        try:
            if error is None:
                self._manager.wait_until_finished()
        except BaseException as e:
            error = e
        reason = self._together.outcome(path, error)
        try:
            if not reason and jax.process_index() == 0:
                (path / META).write_text(json.dumps(about, indent=1))
                manifests.write(path)
                self._drop()
        except BaseException as e:
            error = e
        if reason := reason or self._together.outcome(path, error):
            self._trouble = step, size, reason, error

    def _tell(self, step, size, reason, error):
        """Of a checkpoint that was not written: what it left is removed, so that there is room for the next."""
        path = self.folder / str(step)
        free = shutil.disk_usage(self.folder).free if self.folder.is_dir() else 0
        if jax.process_index() == 0 and not _is_complete(path):  # all have agreed that it is nobody's
            for left in (path, *self.folder.glob(f"{step}.orbax-checkpoint-tmp*")):
                shutil.rmtree(left, ignore_errors=True)
        self._close()  # Orbax would tell it again
        said = f"checkpoint {path} was not written: {reason}; it takes {size:,} bytes and {free:,} were free"
        if self.failed is None:
            raise distributed.shared(OSError(said)) from error
        self.failed(said)

    def _drop(self):
        """Removes the checkpoints that nothing keeps."""
        steps = complete(self.folder)
        kept = {*steps[-self.keep :]} | {s for s in steps if self.every is not None and s % self.every == 0}
        if self.best is not None:
            kept.add(max(steps, key=self._worth))
        for path in self.folder.glob(f"*{_REMOVED}"):
            shutil.rmtree(path, ignore_errors=True)  # what could not be removed before
            if path.exists():
                self._note(path, "")
        for path in (self.folder / str(step) for step in steps if step not in kept):
            try:
                _remove(path)
            except OSError as e:  # the one that was saved is whole for all that
                self._note(path, f" ({_reason(e)})")

    def _note(self, path, why):
        """Tells once, with the next word from the thread of the run, that something stays and takes room."""
        if path not in self._stuck:
            self._notes.append(f"{path} is not needed any more and could not be removed{why}; it takes room")
        self._stuck.add(path)

    def _worth(self, step):
        """What ``best`` says of a checkpoint; the least, where its notes are damaged."""
        try:
            return self.best(self.meta(step)["metrics"])
        except ValueError:
            return -math.inf

    def _close(self):
        manager, self._manager = self._manager, None
        if manager is not None:
            try:
                manager.close()
            except Exception as e:  # of a save that has failed, which was told
                logging.getLogger(__name__).debug("closing the manager: %s", e)


class _Apart(Exception):
    """Another process is not where this one is: it has failed, and its outcome says how."""


class _Together:
    """Where the processes that write a checkpoint wait for each other, and hear when one of them has failed.

    Orbax's own barriers know nothing of a process that does not come because it could not write: the others would wait
    for as long as writing may take. Here each says where it is. Who hears that another is elsewhere fails, there and
    at all barriers after it, and so comes to the outcome too.
    """

    def __init__(self):
        self.apart = False

    def barrier(self, *, key, timeout_ms):
        """Orbax's ``barrier_sync_fn``."""
        if self.apart:
            raise _Apart(key)
        self.apart = True  # when the next line fails, too
        self.apart = {*distributed.everybodys(key, of="saves", seconds=timeout_ms / 1000)} != {key}
        if self.apart:
            raise _Apart(key)

    def outcome(self, path, error) -> str:
        """Why the checkpoint is none, the same for all; empty when all have done their part."""
        self.apart |= error is not None
        while isinstance(error, _Apart):
            error = error.__context__  # what this process failed of before it met nobody
        mine = {"outcome": "" if error is None else _reason(error), "whole": not self.apart}
        said = [{}]
        try:
            while not all("outcome" in one for one in said):  # a second time when some were at a barrier
                soon = {} if mine["whole"] else {"seconds": _COME}
                everyones = distributed.everybodys(json.dumps(mine), of="saves", **soon)
                said = [json.loads(one) if one.startswith("{") else {} for one in everyones]
        except (jax.errors.JaxRuntimeError, KeyError) as e:  # KeyError: after a barrier that took too long
            why = mine["outcome"] or f"the others did not come ({_reason(e)})"
            distributed.give_up(f"checkpoint {path} was not written, and not all processes know it: {why}", 2)
            return why
        if all(one["whole"] for one in said):
            return ""
        failed = [(i, one["outcome"]) for i, one in enumerate(said) if one["outcome"]]
        if len(said) == 1:
            return failed[0][1]
        return "; ".join(f"process {i} of {len(said)}: {why}" for i, why in failed[:1]) or "the processes came apart"


def complete(folder, warn=lambda sentence: None) -> list[int]:
    """The steps that have a complete checkpoint in a folder, in order; warns of everything else in it."""
    folder, found = pathlib.Path(folder), []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if _is_step(path) and _is_complete(path):
            found.append(int(path.name))
        elif _is_step(path):
            warn(f"{path} is not a complete checkpoint, it has no {manifests.NAME}; it is not used")
        elif path.suffix not in (_DAMAGED, _REMOVED):
            warn(f"{path} is no checkpoint; it is not used")
    return sorted(found)


def read_meta(path) -> dict:
    """What was noted beside the state in the folder of one checkpoint.

    Raises:
      ValueError: it is not there, or of a later format.
    """
    path = pathlib.Path(path)
    try:
        about = json.loads((path / META).read_text())
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: is no checkpoint, its {META} cannot be read ({e})") from e
    if about.get("format", 0) > FORMAT:
        raise ValueError(f"{path}: has format {about['format']}, this version reads up to {FORMAT}; update pt_jax")
    return about


def restore(path, like):
    """The state in the folder of one checkpoint, placed as ``like`` is: on any mesh, on any number of devices.

    Args:
      path: of the checkpoint; its checksums are not looked at (``Checkpoints.newest``, ``check``).
      like: tree of arrays, or of ``jax.ShapeDtypeStruct`` with a sharding; without one, on the first device.

    Raises:
      ValueError: the saved state has other names, shapes or types; nothing is cast.
    """
    saved = read_meta(path)["spec"]
    if (gap := specs.difference(saved, specs.spec(like))) is not None:
        raise ValueError(f"{path}: is of another state: {gap}")
    return _read(path, like)


def restore_part(path, like):
    """The same of a part of the state, such as ``{"params": ...}``; the rest is not read."""
    saved, wanted = read_meta(path)["spec"], specs.spec(like)
    if (gap := specs.difference({name: x for name, x in saved.items() if name in wanted}, wanted)) is not None:
        raise ValueError(f"{path}: is of another state: {gap}")
    return _read(path, like)


def check(path) -> None:
    """Fails when a file of one checkpoint is not what was written."""
    if faults := manifests.faults(path):
        raise ValueError(f"{path}: is damaged: {_several(faults)}")


def _read(path, like):
    import orbax.checkpoint as ocp

    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    place = lambda x: getattr(x, "sharding", None) or where
    wanted = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)) for name, x in _arrays(like).items()}
    full = {name: x for name, x in wanted.items() if x.size}
    how = ocp.checkpoint_utils.construct_restore_args(full)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        args = ocp.args.PyTreeRestore(item=full, restore_args=how, partial_restore=True)
        leaves = reader.restore(pathlib.Path(path).resolve() / _ARRAYS, args=args)
    empty = {name: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding) for name, x in wanted.items() if not x.size}
    return specs.unflat(leaves | empty, like)


def _arrays(tree) -> dict:
    return {name: _array(x) for name, x in specs.flat(tree).items()}


def _array(x):
    return x if hasattr(x, "dtype") else np.asarray(x)


def _manager(folder, together):
    import orbax.checkpoint as ocp
    from orbax.checkpoint.options import AsyncOptions, AtomicityMode, AtomicityOptions

    how = ocp.CheckpointManagerOptions(
        max_to_keep=None, enable_async_checkpointing=True,
        async_options=AsyncOptions(timeout_secs=_COMMITTED, barrier_sync_fn=together.barrier),
        atomicity_options=AtomicityOptions(mode=AtomicityMode.COMMIT_FILE),
    )  # fmt: skip
    return ocp.CheckpointManager(folder, options=how)


def _is_step(path) -> bool:
    return path.is_dir() and path.name.isdecimal()


def _is_complete(path) -> bool:
    return (path / manifests.NAME).is_file()


def _remove(path) -> None:
    """A checkpoint, in one move: what a run that is killed meanwhile leaves is nobody's checkpoint, and goes later."""
    removed = _free(path, _REMOVED)
    path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _free(path, suffix) -> pathlib.Path:
    """A name beside a checkpoint's that nothing has; on NFS one that was removed stays while a file of it is open."""
    names = (path.with_name(f"{path.name}{f'.{n}' if n else ''}{suffix}") for n in itertools.count())
    return next(name for name in names if not name.exists())


def _several(faults) -> str:
    return faults[0] + (f" (and {len(faults) - 1} more)" if len(faults) > 1 else "")


def _reason(error) -> str:
    """An error in a few words; a full disk's comes with a page of how the array was stored."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG):
        if (known := os.strerror(number)) in text:
            return known
    return f"{type(error).__name__}: {text:.200}"
