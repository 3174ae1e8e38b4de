"""SIGTERM and Ctrl-C, the way a run wants them: a wish to stop at the next whole step, not an end in the middle of one.

    with signals.watched():        # first of all, before anything is imported or loaded
        ...                        # a signal ends the block at once: there is nothing to save yet
        with signals.deferred():
            ...                    # a signal is only noted; the loop asks ``asked()`` after each step

The second signal ends the process, whatever it does. Knows nothing of JAX, so that it can be there before it.
"""

import contextlib
import os
import signal
import sys
import threading
import time

RESUME = 75  # the exit code that says: start me again with --resume auto (EX_TEMPFAIL of sysexits.h)
SIGNALS = (signal.SIGTERM, signal.SIGINT)
_END = b"\0"  # no signal's number
_GRACE = 5.0  # seconds that a block which may end at once has to do so


class Stopped(KeyboardInterrupt):
    """A run was asked to stop and has; ``code`` is what its process ends with.

    Args:
      reason: such as SIGTERM.
    """

    code = RESUME

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class _Watch:
    def __init__(self):
        self.asked, self.deferred, self.begun = None, False, time.monotonic()


_watch: _Watch | None = None


def asked() -> str | None:
    """The name of the signal that has come, or None."""
    return _watch.asked if _watch else None


def seconds() -> float:
    """How long signals have been watched: since the start of a command; 0 where nothing watches them."""
    return time.monotonic() - _watch.begun if _watch else 0.0


@contextlib.contextmanager
def watched():
    """Signals are ours while the block runs; within another one, or outside of the main thread, nothing changes."""
    global _watch
    if _watch is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _watch, (reads, writes) = _Watch(), os.pipe()
    os.set_blocking(writes, False)
    before = {number: signal.signal(number, _handle) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    listener = threading.Thread(target=_listen, args=(reads, _watch), daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.write(writes, _END)
        listener.join()
        os.close(writes)
        os.close(reads)
        _watch = None


@contextlib.contextmanager
def deferred():
    """Signals are only noted while the block runs; whether one has come is said by ``asked``."""
    with watched():
        if _watch is None:  # not the main thread
            yield
            return
        before, _watch.deferred = _watch.deferred, True
        try:
            yield
        finally:
            _watch.deferred = before


def _handle(number, frame):
    """In the main thread, once it is back in Python: a compilation may keep it for minutes."""
    first, _watch.asked = _watch.asked is None, _watch.asked or signal.Signals(number).name
    if not first:
        os._exit(128 + number)
    if not _watch.deferred:
        raise Stopped(_watch.asked)


def _listen(reads, watch):
    """In a thread of its own, which hears of a signal at once."""
    heard = 0
    while (got := os.read(reads, 1)) != _END:
        if got[0] not in SIGNALS:
            continue
        heard += 1
        name = signal.Signals(got[0]).name
        if heard > 1:
            os._exit(128 + got[0])
        if watch.deferred:
            sys.stderr.write(f"pt-jax: {name}: stops after this step; once more stops at once and saves nothing\n")
        else:
            threading.Thread(target=_end, args=(watch,), daemon=True).start()


def _end(watch):
    """Of a block that may end at once and does not get to it."""
    time.sleep(_GRACE)
    if watch is _watch and watch.asked is None and not watch.deferred:
        os._exit(RESUME)
