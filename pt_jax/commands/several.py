"""A command in several processes, one a host, on the devices of all: the same options for each but its number."""

import contextlib
import dataclasses

import jax

from pt_jax import checks, signals
from pt_jax.training import distributed


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


def writes() -> bool:
    """Whether this process is the one that writes logs and models."""
    return jax.process_index() == 0


def check_same(noted: dict, step) -> None:
    """Fails unless all processes run the same options on the same files, from the same step."""
    options = {name: value for name, value in noted["options"].items() if name not in OWN}
    distributed.same(**noted | {"options": options, "step": step})
