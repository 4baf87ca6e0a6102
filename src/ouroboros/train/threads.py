"""How many threads a process computes with: chosen by measurement, and fewer while other programs use the processor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import torch

LONG_STEP = 2.0
"""Seconds; a step that takes longer is large enough for all threads to pay, and too long to be repeated."""


def choose_threads(step: Callable[[], Any]) -> int:
    """The number of threads with which ``step`` is fastest: 1, 2, 4 and so on, and the number that torch has now.

    Small models can be faster with one thread than with several that wait for each other. The candidates take turns, so
    that what else the machine does meets all of them; of those within 3 % of the best the smallest number is taken.

    Args:
        step: a forward and backward pass of the training shape.
    """
    most = torch.get_num_threads()
    candidates = [count for count in (2**power for power in range(16)) if count < most] + [most]
    if len(candidates) == 1:
        return most
    seconds = dict.fromkeys(candidates, float("inf"))
    try:
        step()  # warms up
        for _ in range(3):
            for count in candidates:
                torch.set_num_threads(count)
                begun = perf_counter()
                step()
                seconds[count] = min(seconds[count], perf_counter() - begun)
                if seconds[count] > LONG_STEP:
                    return most
            candidates = [count for count in candidates if seconds[count] <= 1.25 * min(seconds.values())]
            if len(candidates) == 1:
                break
    finally:
        torch.set_num_threads(most)
    best = min(seconds.values())
    return next(count for count in candidates if seconds[count] <= 1.03 * best)


@contextlib.contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Within the context torch computes with ``count`` threads; what sets another number there is undone at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Window:
    """Steps in a row that are judged together.

    Args:
        seconds: that they take, at least.
        steps: how many there are, at least.
    """

    def __init__(self, seconds: float, steps: int) -> None:
        self.seconds, self.steps = seconds, steps
        self.took = 0.0
        """Seconds of the last full window."""
        self._seconds, self._work, self._steps = 0.0, 0.0, 0

    def rate(self, seconds: float, work: float, *, short: bool = False) -> float | None:
        """Count a step; the work per second of the window if that fills it, and a new one begins.

        Args:
            seconds: that the step took.
            work: what it did, in any unit that makes steps comparable, for example visits of blocks.
            short: the number of steps suffices.
        """
        self._seconds, self._work, self._steps = self._seconds + seconds, self._work + work, self._steps + 1
        if self._steps < self.steps or (self._seconds < self.seconds and not short):
            return None
        self.took, rate = self._seconds, self._work / self._seconds
        self._seconds, self._work, self._steps = 0.0, 0.0, 0
        return rate


class Threads:
    """The number of threads of a run, fewer while other programs use the processor.

    Threads that compute together wait for the slowest of them, which is the one that shares its processor with another
    program. When two windows of steps in a row are much slower than the best one, half as many threads take the next
    steps and stay if they are faster; from time to time the whole number is tried again. Nothing is computed twice.

    Args:
        chosen: the number at the start, never exceeded.
        now: the number that computes now, for a run that is resumed.
    """

    WINDOW, STEPS, SLOW, BETTER, PATIENCE, LONGEST = 3.0, 3, 0.6, 1.1, 30.0, 16
    """A judgement takes a window of ``WINDOW`` seconds and ``STEPS`` steps, at least. One under ``SLOW`` of the best is
    slow; another number has to be ``BETTER`` times as fast to be kept. From one attempt to the next pass ``PATIENCE``
    seconds, which double with every attempt that fails, up to ``LONGEST`` times as many."""

    def __init__(self, chosen: int, now: int | None = None) -> None:
        self.chosen, self.now = chosen, chosen if now is None else now
        self._window, self._rate = Window(self.WINDOW, self.STEPS), 0.0
        self._best: dict[int, float] = {}
        self._back_to: int | None = None
        self._waited = self._wait = self.PATIENCE

    def observe(self, seconds: float, work: float) -> int | None:
        """Count a step; the number of threads for the next one where it changes, else None.

        Args:
            seconds: that the step took.
            work: what it did, see :meth:`Window.rate`.
        """
        if self.chosen == 1:
            return None
        self._waited += seconds
        trying = self._back_to is not None
        rate = self._window.rate(seconds, work, short=trying)
        if rate is None:
            return None
        before, self._rate = self._rate, rate
        if trying:
            return self._judge(rate, before)
        self._best[self.now] = max(rate, self._best.get(self.now, 0.0))
        if self._waited < self._wait:
            return None
        if self.now < self.chosen:
            return self._try(self.chosen)
        # The first slow window may have begun before the other program did.
        if max(rate, before) < self.SLOW * self._best[self.now]:
            return self._try(max(1, self.now // 2))
        return None

    def _try(self, count: int) -> int:
        self._back_to, self.now = self.now, count
        return count

    def _judge(self, rate: float, before: float) -> int | None:
        """Keep what was tried, or go back to what was."""
        back_to, self._back_to, self._waited = self._back_to, None, 0.0
        assert back_to is not None
        if rate >= self.BETTER * before:
            self._wait = self.PATIENCE
            return None
        self._wait = min(2 * self._wait, self.LONGEST * self.PATIENCE)
        self._rate, self.now = before, back_to
        return back_to
