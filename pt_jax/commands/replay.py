"""``pt-jax replay``: where two recorded steps part."""

import dataclasses

from tyro.conf import Positional

from pt_jax.training import capture


@dataclasses.dataclass(frozen=True)
class Replay:
    """Says at which stage two recorded steps part (batch, frozen, state before, loss, gradients, updates, state after).

    Args:
      first: folder of a step, of ``training.capture``.
      second: the same step, of another machine, version or run.
    """

    first: Positional[str]
    second: Positional[str]


def run(options: Replay) -> list[capture.Divergence]:
    """Prints the stage and what differs in it; returns that."""
    found = capture.compare(options.first, options.second)
    print(capture.report(found))
    return found
