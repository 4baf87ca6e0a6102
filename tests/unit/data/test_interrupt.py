from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from ouroboros.data.interrupt import interruptible


def test_work_is_done_and_its_error_raised() -> None:
    done = []
    interruptible(lambda stopped: done.append(stopped()))
    assert done == [False]

    def fail(stopped: Callable[[], bool]) -> None:
        raise LookupError("none")

    with pytest.raises(LookupError, match="none"):
        interruptible(fail)


def test_an_interruption_is_heard_while_the_work_goes_on() -> None:
    ended = threading.Event()

    def work(stopped: Callable[[], bool]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        while not stopped():
            time.sleep(0.01)
        ended.set()

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interruptible(work)
    assert time.monotonic() - start < 5
    assert ended.wait(5)
