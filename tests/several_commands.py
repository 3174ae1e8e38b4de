"""A command as one of several processes, and what befalls it: "FAULT@PROCESS" or "none", and the words of the command.

Started by tests/commands/test_several.py. Where something befalls one, the others wait for it ``HEARTBEAT`` seconds.
"""

import os
import pathlib
import signal
import sys

HEARTBEAT = 4.0


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def main(fault, *words):
    from pt_jax import cli
    from pt_jax.commands import fitting
    from pt_jax.training import checkpoints, distributed, manifests

    where = {
        "before the first step": (fitting.Fit, "compile"),
        "while arrays are written": (checkpoints.Checkpoints, "_complete"),
        "before the manifest": (manifests, "write"),
    }
    what, _, who = fault.partition("@")
    if who:
        distributed.start.__kwdefaults__["heartbeat"] = HEARTBEAT
    if what in where and words[words.index("--process-id") + 1] == who:
        setattr(*where[what], die)
    return cli.main(words)


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    sys.exit(main(*sys.argv[1:]))
