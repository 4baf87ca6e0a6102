"""Ctrl-C while a library works that does not listen to it."""

from __future__ import annotations

import threading
from collections.abc import Callable


def interruptible(work: Callable[[Callable[[], bool]], object]) -> None:
    """Do ``work`` in a thread and wait for it here, where an interruption is heard within a tenth of a second.

    ``work`` is given a function that says whether it was interrupted. What it still does then goes on in the
    background, without effect, until it has finished or the process ends.

    Raises:
        BaseException: what ``work`` raised, or what interrupted the wait.
    """
    stopped, failed = threading.Event(), []

    def run() -> None:
        try:
            work(stopped.is_set)
        except BaseException as error:  # it belongs to the thread that waits
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    try:
        thread.start()
        while thread.is_alive():
            thread.join(0.1)
    except BaseException:
        stopped.set()
        raise
    if failed:
        raise failed[0]
