"""A signal ends what has nothing to save, and is noted by what has."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from pt_jax import signals


def kill(number):
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # the handler runs before the next line


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_before_there_is_a_state_ends_the_block(number):
    with pytest.raises(signals.Stopped) as raised, signals.watched():
        kill(number)
        pytest.fail("the block went on")
    assert raised.value.reason == number.name and raised.value.code == 75
    assert isinstance(raised.value, KeyboardInterrupt)  # no library takes it for an error of its own


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_that_is_deferred_is_only_noted(number, capfd):
    with signals.watched():
        assert signals.asked() is None
        with signals.deferred():
            kill(number)
            assert signals.asked() == number.name
        time.sleep(0.1)
    assert f"pt-jax: {number.name}: stops after this step; once more stops at once" in capfd.readouterr().err
    assert signals.asked() is None


def test_everything_is_as_before_after_the_block():
    mine = lambda *_: None
    before = {number: signal.signal(number, mine) for number in signals.SIGNALS}
    try:
        with signals.deferred():
            assert all(signal.getsignal(number) is not mine for number in signals.SIGNALS)
            with signals.deferred():
                pass
            assert signal.getsignal(signal.SIGTERM) is not mine
        assert all(signal.getsignal(number) is mine for number in signals.SIGNALS)
        assert signal.set_wakeup_fd(-1) == -1
        assert not [t for t in threading.enumerate() if t.name.endswith("(_listen)")]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_thread_that_is_not_the_main_one_watches_nothing():
    seen = []

    def run():
        with signals.deferred():
            seen.append(signals.asked())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [None]


HANGS = """
import hashlib
from pt_jax import signals
signals._GRACE = 0.3
with signals.watched():
    {}
        print("on", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # as a compilation: minutes without a line of Python
"""


@pytest.mark.parametrize(
    ("block", "numbers", "code"),
    [
        ("if True:", [signal.SIGTERM], 75),
        ("with signals.deferred():", [signal.SIGTERM, signal.SIGTERM], 128 + signal.SIGTERM),
    ],
)
def test_what_hangs_outside_of_python_ends_as_well(block, numbers, code):
    run = subprocess.Popen([sys.executable, "-c", HANGS.format(block)], stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "on\n"
    for number in numbers:
        time.sleep(0.3)
        run.send_signal(number)
    assert run.wait(timeout=20) == code
