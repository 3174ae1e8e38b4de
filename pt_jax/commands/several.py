"""A command in several processes, one a host, on the devices of all: the same options for each but its number."""

import contextlib
import dataclasses
import json
import os
import secrets
import time

import jax

from pt_jax import checks, signals
from pt_jax.commands import runs
from pt_jax.training import distributed

PATIENCE = 10.0  # seconds in which what one process writes must be seen by the others


@dataclasses.dataclass(frozen=True, kw_only=True)
class Several:
    """Options of a run of several processes.

    Args:
      coordinator: HOST:PORT of process 0, of a run of several processes: start the same command once on each host, with
        its own --process-id. Or "auto" on TPU pods, and under Slurm or MPI, where JAX finds the others by itself.
      processes: how many there are.
      process_id: which this is, from 0. Number 0 writes the logs and the model; all read the data, and --out must be a
        folder that they share.
    """

    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None


OWN = tuple(field.name for field in dataclasses.fields(Several))
FILES = ("model", "data", "eval_data", "out")  # each host may have its own path to them


@contextlib.contextmanager
def joined(options):
    """The others, while the block runs; nothing where there are none. Signals wait for what all agree on."""
    if getattr(options, "coordinator", None) is None:
        if (given := next((name for name in OWN[1:] if getattr(options, name, None) is not None), None)) is not None:
            raise ValueError(f"--{given.replace('_', '-')} needs --coordinator")
        yield
        return
    if options.coordinator == "auto":
        where = (None, None, None)
    else:
        where = options.coordinator, options.processes, options.process_id
        for name in OWN[1:]:
            if getattr(options, name) is None:
                raise ValueError(f"--coordinator {options.coordinator} needs --{name.replace('_', '-')}")
        checks.positive("--processes", options.processes)
    with signals.deferred(), distributed.joined(*where):
        yield


def give_up(error) -> None:
    """After a sentence for the user: the end of this process, and of the others."""
    distributed.give_up(error, 2)


def judged(judge, count: int) -> list[float]:
    """The numbers of so many things, of which each process judges its part, once; all have them all.

    Args:
      judge: a slice of the things -> a list of their numbers; process 0 is asked for the first.
      count: of the things.
    """
    share, me = -(-count // jax.process_count()), jax.process_index()
    said = distributed.everybodys(json.dumps(judge(slice(me * share, (me + 1) * share))))
    return [x for numbers in said for x in json.loads(numbers)]


def writes() -> bool:
    """Whether this process is the one that writes logs and models."""
    return jax.process_index() == 0


def check_options(options) -> None:
    """Fails unless all processes have the same: first of all, or they would not do the same things until they look."""
    if getattr(options, "coordinator", None) is not None:
        distributed.same(command=type(options).__name__.lower(), options=_same_of(dataclasses.asdict(options)))


def _same_of(options: dict) -> dict:
    return {name: value for name, value in options.items() if name not in (*OWN, *FILES)}


def check_same(noted: dict) -> None:
    """Fails unless all processes run the same options on the same files, wherever these lie."""
    distributed.same(**noted | {"options": _same_of(noted["options"])})


def check_shared(out) -> None:
    """Fails, on all processes, unless all see in ``runs.unfinished(out)`` what process 0 writes there."""
    if jax.process_count() == 1:
        return
    token = distributed.everybodys(secrets.token_hex(16))[0]  # and all have looked at the folder as it was
    file = runs.unfinished(out) / runs.TOKEN
    if writes():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(token)
    distributed.everybodys("written")
    sees = distributed.everybodys("" if _comes(file, token) else str(out))
    if writes():
        file.unlink()
        with contextlib.suppress(OSError):  # there is something of an earlier run
            file.parent.rmdir()
    for i, theirs in enumerate(sees):
        if theirs:
            said = f"--out {theirs} of process {i} is not the folder that process 0 writes to; give one that all share"
            raise distributed.shared(ValueError(said))


def _comes(file, token) -> bool:
    """Whether a file has this text, soon: a network file system remembers for a while what was not there."""
    limit = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(OSError):
            os.listdir(file.parent.parent)  # looks anew
            if file.read_text() == token:
                return True
        if time.monotonic() > limit:
            return False
        time.sleep(0.1)
