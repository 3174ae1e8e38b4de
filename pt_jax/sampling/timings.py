"""How long sampling took, by a clock of the host that starts no transfer and waits for nothing inside of a program."""

import time

import jax
import numpy as np
from flax import struct

COMPILES = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")


@struct.dataclass
class Timings:
    """Of one call.

    A program does not say when it has read its prompts: only what comes in pieces (``stream``) has a first piece that
    is earlier than the whole.

    Args:
      compiled: seconds in which programs were compiled; 0 when all were compiled before.
      first: seconds until the first tokens were there, with what was compiled for them.
      whole: seconds until all were, without what a stream waited for those who take from it.
      tokens: how many were sampled, in all rows together.
    """

    compiled: float
    first: float
    whole: float
    tokens: int

    @property
    def rate(self) -> float:
        """Tokens a second, prompts read and nothing compiled.

        >>> Timings(compiled=2.0, first=2.5, whole=4.0, tokens=100).rate
        50.0
        """
        return self.tokens / (self.whole - self.compiled)


class Watch:
    """A clock that runs from when it is made until it is read, and knows how much of the time went into compiling."""

    def __init__(self):
        self.compiled, self.whole, self.first = 0.0, 0.0, None
        jax.monitoring.register_event_duration_secs_listener(self._add)
        self.go_on()

    def _add(self, name, seconds, **_):
        self.compiled += seconds if name in COMPILES and self.start is not None else 0

    def read(self, tokens: int) -> Timings:
        """What it shows now, where it stands still; the first time is that of the first tokens."""
        self.whole, self.start = self.whole + time.perf_counter() - self.start, None
        self.first = self.whole if self.first is None else self.first
        return Timings(self.compiled, self.first, self.whole, tokens)

    def go_on(self):
        """Runs again, from what it shows."""
        self.start = time.perf_counter()

    def stop(self):
        """No longer listens for compilations."""
        jax.monitoring.unregister_event_duration_listener(self._add)


def timed(sampler, *arguments, **settings):
    """The completions of a sampler and how long they took; it waits for them.

    Args:
      sampler: ``sample``, ``sample_queue``, ``sample_until``, or any function that returns ``Completions``, or a tuple
        that begins with them, as ``speculate`` and ``beam_search``.
      *arguments, **settings: the sampler's.

    Returns:
      What the sampler does, ``Completions`` with ``timings``.
    """
    watch = Watch()
    try:
        out = jax.block_until_ready(sampler(*arguments, **settings))
        completions, *others = out if isinstance(out, tuple) else (out,)
        timings = watch.read(int(np.sum(completions.alive)))
    finally:
        watch.stop()
    if completions.timings is None:
        completions = completions.replace(timings=timings)
    return (completions, *others) if others else completions
