"""Several processes as one program: how they begin, agree, share data, and end together.

    with distributed.joined("host0:1234", processes=2, process_id=0):  # before JAX looks for devices
        distributed.same(config=config, batch=shape)
        mesh = sharding.make_mesh(fsdp=8)  # of the devices of all

Every process runs the same program on the same batches; arrays are spread over the devices of all. What one of them
knows and the others do not (a signal, a bad row, an exception) would leave the others waiting for it in the middle of
a sum, for minutes. So they tell each other, through the coordinator's store, and each watches whether the others are
still there: a process that fails ends all, with a sentence that says which it was.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import sys
import threading
import time
import traceback

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pt_jax.signals import Stopped

# Seconds without a sign of life after which a process is given up. A tensor of some GiB that is read from a slow disk
# keeps Python from giving one.
HEARTBEAT = 30.0
_BEATS = 5  # signs of life in that time
TO_END = 600.0  # seconds for all to come to an end that they share
_FAILED, _ALIVE, _DONE = "pt_jax/failed/", "pt_jax/alive/", "done"

_watch = None
_turns = collections.defaultdict(itertools.count)


def _client():
    """The store of the coordinator. JAX has no public name for it."""
    from jax._src import distributed

    return distributed.global_state.client


def start(coordinator=None, processes=None, process_id=None, *, heartbeat=HEARTBEAT, patience=300) -> None:
    """Makes this process one of several, and watches the others; before JAX looks for devices.

    Args:
      coordinator: "host:port" of process 0; None, with the other two, where JAX finds them by itself: on TPU pods, and
        under Slurm or MPI.
      processes: how many there are.
      process_id: which this is.
      heartbeat: seconds without a sign of life after which a process is given up.
      patience: seconds to wait for all to come.

    Raises:
      ValueError: only some of the three are given, or they make no sense; or the coordinator is not found.
    """
    given = {"coordinator": coordinator, "processes": processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < 3:
        raise ValueError(f"{', '.join(missing)} must be given as well, or none of {', '.join(given)}")
    if not missing and not 0 <= process_id < processes:
        raise ValueError(
            f"process_id must be from 0 to {processes - 1}, the last of {processes} processes, got {process_id}"
        )
    if not missing and not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"coordinator must be host:port, got {coordinator!r}")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, and lose what comes early
    seconds = max(1, round(heartbeat))
    try:
        jax.distributed.initialize(
            coordinator, processes, process_id, initialization_timeout=patience,
            heartbeat_timeout_seconds=2 * seconds, shutdown_timeout_seconds=seconds,
        )  # fmt: skip
    except (ValueError, RuntimeError) as e:
        where = "found by JAX" if missing else f"{coordinator}, process {process_id} of {processes}"
        raise ValueError(f"the processes did not come together ({where}): {e}") from e
    global _watch
    _watch = _Watch(heartbeat)


def stop(error=None) -> None:
    """The end of a process that has done its part; waits for the others, however long they take.

    Args:
      error: that all are ending with; then they have ``TO_END`` seconds, in case one of them did not meet it.
    """
    global _watch
    if _watch is not None:
        try:
            everybodys("done", seconds=3600 if error is None else TO_END)
        except jax.errors.JaxRuntimeError:
            if error is None:
                raise
            _watch.give_up(f"{error} (and the others have not come to this within {TO_END:g} seconds)", 1)
        _watch.end()
        _watch = None
        jax.distributed.shutdown()


@contextlib.contextmanager
def joined(coordinator=None, processes=None, process_id=None, **how):
    """``start`` and ``stop`` around a block; an exception in it ends this process and all others.

    It is printed, the others say which process failed first, and all exit with 1. What ``is_shared`` goes its way.
    """
    start(coordinator, processes, process_id, **how)
    try:
        yield
    except BaseException as e:
        if not is_shared(e):
            traceback.print_exc()
            give_up(e)
        stop(e)
        raise
    stop()


def give_up(error, code: int = 1) -> None:
    """Ends this process with ``code`` and all others with 1, where there are several; else does nothing.

    Where all have the same error it waits for them, and gives back: one may still be writing what there is.

    Args:
      error: the exception, or a sentence, that the others are to say.
    """
    if is_shared(error):
        stop(error)
    elif _watch is not None:
        _watch.give_up(error, code)


def shared(error):
    """The error, marked as one that all processes raise at the same place."""
    error.is_shared = True
    return error


def is_shared(error) -> bool:
    """Whether all processes raise it: they have agreed on it, or it is of numbers that all of them have."""
    return isinstance(error, SystemExit | Stopped | FloatingPointError) or getattr(error, "is_shared", False)


class _Watch:
    """Says that this process is alive, and looks whether the others are."""

    def __init__(self, heartbeat):
        self.me, self.count, self.heartbeat = jax.process_index(), jax.process_count(), heartbeat
        self.ended, self.lock = threading.Event(), threading.Lock()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def end(self):
        self.ended.set()
        self.thread.join()
        _client().key_value_set(f"{_ALIVE}{self.me}", _DONE, allow_overwrite=True)

    def give_up(self, error, code):
        if isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(1.5 * self.heartbeat)  # most likely another one is gone, and the watch says so and ends this one
        said = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        with self.lock:  # or the watch would take its own words for somebody else's
            self.ended.set()
            with contextlib.suppress(Exception):
                _client().key_value_set(f"{_FAILED}{self.me}", said, allow_overwrite=True)
            if self.me == 0:
                time.sleep(3 * self.heartbeat / _BEATS)  # the store ends with this process: let the others read
            _exit(f"process {self.me} of {self.count} failed first, and all end: {said}", code)

    def _run(self):
        beats, seen = itertools.count(), {}
        while not self.ended.wait(self.heartbeat / _BEATS):
            with self.lock:
                if not self.ended.is_set():
                    self._look(str(next(beats)), seen)

    def _look(self, beat, seen):
        client, now = _client(), time.monotonic()
        try:
            client.key_value_set(f"{_ALIVE}{self.me}", beat, allow_overwrite=True)
            failed, alive = (dict(client.key_value_dir_get(key)) for key in (_FAILED, _ALIVE))
        except jax.errors.JaxRuntimeError as e:
            _exit(f"process 0 of {self.count}, the coordinator, is gone, and all end: {e!s:.200}")
        for key, said in failed.items():
            _exit(f"process {key.removeprefix(_FAILED)} of {self.count} failed first, and all end: {said}")
        for other in range(self.count):
            sign = alive.get(f"{_ALIVE}{other}")
            if seen.get(other, (None,))[0] != sign or other not in seen:
                seen[other] = sign, now
            if sign != _DONE and now - seen[other][1] > self.heartbeat:
                said = f"process {other} of {self.count} has given no sign of life for {self.heartbeat:g} seconds"
                _exit(f"{said}: it was killed, stopped, or lost its network; all end")


def _exit(sentence, code=1):
    """At once: an orderly end would wait for processes that do not come any more."""
    sys.stdout.flush()
    print(f"pt-jax: {sentence}", file=sys.stderr, flush=True)
    os._exit(code)


# ---- agreeing


def everybodys(value: str, *, of: str = "turn", seconds: float = 3600) -> list[str]:
    """What each process says, in their order; all call it, the same number of times.

    Args:
      value: what this one says.
      of: name of what they speak of; what threads say of different things may cross.
      seconds: to wait for all; the watch ends it sooner if somebody is gone.

    Raises:
      jax.errors.JaxRuntimeError: not all have come.
    """
    if jax.process_count() == 1:
        return [value]
    client, me, number = _client(), jax.process_index(), next(_turns[of])
    turn = lambda number: f"pt_jax/{of}/{number}/"
    client.key_value_set(f"{turn(number)}{me}", value)
    client.wait_at_barrier(f"pt_jax/{of}", max(1, round(1000 * seconds)))
    said = dict(client.key_value_dir_get(turn(number)))
    if number:  # all have come to this turn, so all have read the one before
        client.key_value_delete(f"{turn(number - 1)}{me}")
    return [said[f"{turn(number)}{i}"] for i in range(jax.process_count())]


def same(**values) -> None:
    """Fails, on all processes, unless each value is the same on all of them.

    Args:
      **values: name to what is to be the same: a config, the shape of a batch, a checksum, the step to go on from. They
        are compared by their ``repr``; of dicts and dataclasses, entry by entry.

    Raises:
      ValueError: names the first value, or entry, that differs, and what two processes have.
    """
    mine = json.dumps(dict(_entries(values)))
    everyones = [json.loads(said) for said in everybodys(mine)]
    for name in {name: None for said in everyones for name in said}:
        for i, said in enumerate(everyones):
            first, other = (x.get(name, "nothing") for x in (everyones[0], said))
            if other != first:
                said = f"{first:.200} on process 0 and {other:.200} on process {i}"
                raise shared(ValueError(f"{name} is {said}; start all with the same"))


def _entries(values, prefix=""):
    for name, value in values.items():
        if dataclasses.is_dataclass(value):
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, dict):
            yield from _entries(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", repr(value)


def agreed(stop, every: int = 1):
    """A function of a step's number that any process may answer: what the first of those who say something says.

    Args:
      stop: step -> reason, or None; such as ``signals.asked`` of a run.
      every: ask only after steps that this divides, on all processes alike: the answer takes a message to everybody.
    """
    if jax.process_count() == 1:
        return stop
    return lambda step: (
        next((said for said in everybodys(stop(step) or "") if said), None) if step % every == 0 else None
    )


# ---- arrays


def rows_here(sharding, count: int) -> np.ndarray:
    """Which of a batch's rows lie on the devices of this process: the ones that it must read.

    Args:
      sharding: of a leaf of the batch (``sharding.rows``, ``sharding.of_batch``).
      count: rows of the whole batch.
    """
    of_rows = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
    parts = of_rows.addressable_devices_indices_map((count,)).values()
    return np.array(sorted({row for (part,) in parts for row in range(*part.indices(count))}))


def from_rows(batch, shardings, count: int):
    """A global batch of what each process has read of it.

    Args:
      batch: arrays [rows here, ...], the rows of ``rows_here``.
      shardings: of the whole batch, one for all leaves or a tree.
      count: rows of the whole batch.

    Raises:
      ValueError: a leaf has another number of rows than lie here.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, batch)

    def one(path, x, sharding):
        rows = rows_here(sharding, count).tolist()
        if len(x) != len(rows):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(f"batch.{name} has {len(x)} rows, but {len(rows)} of {count} lie on this process")
        where = {row: i for i, row in enumerate(rows)}
        part = lambda at: x[[where[row] for row in range(*at[0].indices(count))]][(slice(None), *at[1:])]
        return jax.make_array_from_callback((count, *x.shape[1:]), sharding, part)

    return jax.tree_util.tree_map_with_path(one, batch, shardings)


def fetched(tree):
    """The arrays of a tree in numpy, whole, on every process: the host must have room for them."""
    from jax.experimental import multihost_utils

    whole = lambda x: x.is_fully_addressable or x.is_fully_replicated
    of = lambda x: np.asarray(x) if whole(x) else multihost_utils.process_allgather(x, tiled=True)
    return jax.tree.map(lambda x: of(x) if isinstance(x, jax.Array) else x, tree)


def written(write, tree) -> None:
    """``write(tree)`` on process 0, which gets what it asks for when it asks for it; the others send it their part.

    So no host has all of a tree in numpy because of this, and a device has, beside its own part, a layer of an array,
    or ``PIECE`` bytes, at a time.

    Args:
      write: asks for the numbers of a leaf by ``np.asarray``, or by ``leaf[i]`` and ``leaf[i, j]`` of a stack.
      tree: of arrays, on all processes.
    """
    if jax.process_count() == 1:
        write(tree)
        return
    leaves, structure = jax.tree.flatten(tree)
    if jax.process_index() == 0:
        leaves = [x.addressable_data(0) if x.is_fully_replicated else _Afar(i, x) for i, x in enumerate(leaves)]
        write(jax.tree.unflatten(structure, leaves))
        everybodys("written")
        return
    while (asked := everybodys("")[0]) != "written":
        number, *where = json.loads(asked)
        _brought(leaves[number], *where)


PIECE = 1 << 26  # bytes of a leaf that every device gets at once


class _Afar:
    """An array of several processes in the hands of number 0; each look at it takes a message to the others."""

    def __init__(self, number, x):
        self.number, self.x, self.shape, self.dtype, self.ndim, self.size = number, x, x.shape, x.dtype, x.ndim, x.size
        self.layer, self.numbers = None, None  # the last, of which a mixture's experts are asked for one by one

    def __getitem__(self, at):
        layer, *rest = at if isinstance(at, tuple) else (at,)
        if layer != self.layer:
            self.numbers = None  # there need not be room for two
            self.layer, self.numbers = layer, self._bring(0, layer, 1)[0]
        return self.numbers[tuple(rest)]

    def __array__(self, dtype=None, copy=None):
        if self.ndim == 0:
            return self._bring().astype(dtype or self.dtype)
        local = self.x.sharding.shard_shape(self.shape)
        axis = next((i for i in range(self.ndim) if local[i] == self.shape[i]), 0)  # so that cutting moves nothing
        out = np.empty(self.shape, dtype or self.dtype)
        length = self.shape[axis]
        step = max(1, PIECE * length // max(1, self.size * self.dtype.itemsize))
        for begin in range(0, length, step):
            count = min(step, length - begin)
            out[(slice(None),) * axis + (slice(begin, begin + count),)] = self._bring(axis, begin, count)
        return out

    def _bring(self, *where):
        everybodys(json.dumps([self.number, *where]))
        return np.asarray(_brought(self.x, *where).addressable_data(0))


def _brought(x, axis=None, begin=0, count=0):
    """An array, or its part along an axis, whole on every device."""
    return _cut(x.sharding.mesh, axis, count)(x, begin)


@functools.cache
def _cut(mesh, axis, count):
    def cut(x, begin):
        return x if axis is None else jax.lax.dynamic_slice_in_dim(x, begin, count, axis)

    return jax.jit(cut, out_shardings=NamedSharding(mesh, PartitionSpec()))
