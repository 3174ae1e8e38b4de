"""``pt-jax <command>``: a record of options becomes the flags of a command."""

import contextlib
import functools
import operator
import os
import shlex
import sys
from typing import Annotated

from pt_jax import signals

TRAINING = ("sft", "dpo", "grpo")  # what is stopped by signals between two steps, and gone on with


def main(argv=None) -> int:
    """Runs a command.

    Bad input, a run that diverges and a checkpoint that must be and cannot be written end in one sentence on standard
    error and the exit code 2; an interruption in 130. A training command
    that SIGTERM, Ctrl-C or --max-minutes stops ends in 75, which says: start me again with --resume auto. Everything
    else that goes wrong is a bug of this project or of the machine, and keeps its traceback.

    Args:
      argv: the words after ``pt-jax``; those of the process when None.

    Returns:
      The exit code.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        with signals.watched() if argv[:1] and argv[0] in TRAINING else contextlib.nullcontext():
            return _run(argv)
    except signals.Stopped as e:
        said = f"stopped by {e.reason}; start it again with --resume auto to go on"
        print(_sentence(said, e), file=sys.stderr)
        return e.code
    except KeyboardInterrupt as e:
        print(_sentence("stopped", e), file=sys.stderr)
        return 130


def _run(argv) -> int:
    # transformers says on standard error that there is no torch; there is not meant to be
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import tyro

    from pt_jax.commands import dpo, export, grpo, inspect, quickstart, replay, several, sft, talk

    commands = {
        "quickstart": (quickstart.Quickstart, quickstart.run),
        "sft": (sft.SFT, trained(sft.run)),
        "dpo": (dpo.DPO, trained(dpo.run)),
        "grpo": (grpo.GRPO, trained(grpo.run)),
        "generate": (talk.Generate, generated(talk.generate)),
        "chat": (talk.Chat, talk.chat),
        "inspect": (inspect.Inspect, inspect.run),
        "export": (export.Export, trained(export.run)),
        "replay": (replay.Replay, replay.run),
    }
    named = (Annotated[kind, tyro.conf.subcommand(name)] for name, (kind, _) in commands.items())
    either = tyro.conf.OmitSubcommandPrefixes[functools.reduce(operator.or_, named)]
    options = tyro.cli(either, prog="pt-jax", args=argv, description="Post-training of language models in pure JAX.")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(several.joined(options))
            several.check_options(options)
            next(run for kind, run in commands.values() if type(options) is kind)(options)
        except (ValueError, FloatingPointError, OSError) as e:
            if not _raised_here(e):
                raise
            print(_sentence(e, e), file=sys.stderr)
            several.give_up(e)
            return 2
    return 0


def trained(run):
    """A command that says at the end where its model is; with --resume auto nothing is done where it is already."""

    def command(options):
        from pt_jax.commands import keeping
        from pt_jax.training import distributed

        finished = keeping.finished(options)
        distributed.same(**{"that the model is at --out already": finished})  # or some would end, without the others
        if not finished:
            run(options)
        said = f"{options.out} is finished already; nothing is left to do." if finished else f"Saved {options.out}."
        print(f"{said} Go on with: pt-jax chat {shlex.quote(options.out)}")

    return command


def generated(run):
    """A command that prints the texts it returns."""

    def command(options):
        print("\n\n".join(run(options)))

    return command


def _sentence(said, error) -> str:
    """What is said of an error, and where a run that it ended has left what there is."""
    left = getattr(error, "left_in", None)
    return f"pt-jax: {said}" + (f"; what there is so far is in {left}" if left else "")


def _raised_here(error) -> bool:
    """Whether this project raised it, with a sentence for the user; a library's errors are not for them."""
    frame = error.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    return frame.tb_frame.f_globals.get("__name__", "").startswith("pt_jax.")


if __name__ == "__main__":
    sys.exit(main())
