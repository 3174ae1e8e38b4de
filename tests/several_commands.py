"""A command as one of several processes, and what befalls it: "FAULT@PROCESS" or "none", and the words of the command.

Started by tests/commands/test_several.py. Where something befalls one, the others wait for it ``HEARTBEAT`` seconds.
"""

import errno
import os
import pathlib
import signal
import sys
import time

HEARTBEAT = 4.0


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def slowly(function):
    return lambda *args: (time.sleep(3 * HEARTBEAT), function(*args))[1]


def full(path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def main(fault, *words):
    from pt_jax import cli
    from pt_jax.commands import fitting, keeping
    from pt_jax.training import checkpoints, distributed, manifests

    where = {
        "before the first step": (fitting.Fit, "compile", die),
        "while arrays are written": (checkpoints.Checkpoints, "_complete", die),
        "before the manifest": (manifests, "write", die),
        "for a full disk": (manifests, "write", full),
        "slowly": (keeping, "leave_batch", slowly(keeping.leave_batch)),
    }
    what, _, who = fault.partition("@")
    if who:
        distributed.start.__kwdefaults__["heartbeat"] = HEARTBEAT
    if what in where and words[words.index("--process-id") + 1] == who:
        setattr(*where[what])
    return cli.main(words)


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    sys.exit(main(*sys.argv[1:]))
