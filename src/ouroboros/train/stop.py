"""Where a run is, and when it ends: its budget, what validation says, and the signals that ask it to stop."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Literal

from ouroboros.config import TrainSpec
from ouroboros.errors import OuroborosError, check

if TYPE_CHECKING:
    import numpy as np


@dataclass
class Counters:
    """Where a run is. Saved with every checkpoint."""

    step: int = 0
    """Optimiser steps taken, skipped ones included."""
    tokens: int = 0
    """Training tokens seen, over all processes."""
    seconds: float = 0.0
    """Wall-clock time of training, earlier sessions included."""
    skipped: int = 0
    """Steps skipped because of a non-finite loss or gradient."""
    bad_in_a_row: int = 0
    best_bits_per_byte: float | None = None
    best_step: int | None = None
    validations_without_best: int = 0
    """Validations since the best one; those that failed do not count."""
    failed_validations: int = 0
    """Validations that ended in an error."""
    failed_validations_in_a_row: int = 0
    valid_bits_per_byte: float | None = None
    """From the last validation, like the next two."""
    valid_nats_per_token: float | None = None
    valid_nats_stderr: float | None = None
    """Standard error of ``valid_nats_per_token``."""


def check_budget(spec: TrainSpec) -> None:
    """Refuse a training without an end; the specification itself refuses one with several."""
    given = [spec.steps, spec.tokens, spec.minutes]
    check(given != [None] * 3, "train: give exactly one of --steps, --tokens and --minutes")


def share_done(spec: TrainSpec, step: float, tokens: float, seconds: float) -> float:
    """The share of the run's budget that is spent, in [0, 1].

    Args:
        spec: has exactly one of the three budgets.
        step: optimiser steps done; ``step + 0.5`` gives the middle of the next one.
        tokens: training tokens seen, over all processes.
        seconds: time spent training, earlier sessions of a resumed run included.
    """
    if spec.steps is not None:
        share = step / spec.steps
    elif spec.tokens is not None:
        share = tokens / spec.tokens
    else:
        share = seconds / (60.0 * (spec.minutes or math.inf))
    return min(max(share, 0.0), 1.0)


@dataclass(frozen=True)
class EarlyStop:
    """Why a run ends before its budget is spent."""

    reason: Literal["target_loss", "patience"]
    """The field of ``train`` that decided."""
    message: str
    """The same for people, with the numbers."""


def early_stop(spec: TrainSpec, counters: Counters) -> EarlyStop | None:
    """Whether the validations so far end the run: a function of what a checkpoint keeps, so a resumed run agrees.

    ``target_loss`` asks for the mean over a fixed sample plus two standard errors. The smallest of many means over
    changing samples would be biased low, and stop the run before the loss is there. Without a standard error, of a
    sample of one piece, the target is never reached.
    """
    c = counters
    nats, stderr, bits = c.valid_nats_per_token, c.valid_nats_stderr, c.valid_bits_per_byte
    known = nats is not None and stderr is not None and bits is not None
    if known and spec.target_loss is not None and nats + 2 * stderr <= spec.target_loss:
        return EarlyStop(
            "target_loss",
            f"validation {nats:.4f} nats per token ({bits:.4f} bits per byte) is at or below the target"
            f" {spec.target_loss:g}, two standard errors ({2 * stderr:.4f}) included",
        )
    if spec.patience and c.best_step is not None and c.validations_without_best >= spec.patience:
        return EarlyStop(
            "patience",
            f"{c.validations_without_best} validations in a row without a new best, which is"
            f" {c.best_bits_per_byte:.4f} bits per byte at step {c.best_step:,}",
        )
    return None


class StopControl:
    """Turns signals into a request to save and stop, within a ``with`` block.

    The first SIGINT and any SIGTERM set :attr:`requested`; the loop saves a checkpoint and ends. The second SIGINT
    ends the process at once with status 130. Outside the main thread no handler is installed.

    Args:
        on_request: told in one line what was requested.
    """

    def __init__(self, on_request: Callable[[str], None]) -> None:
        self._tell = on_request
        self._previous: dict[int, Any] = {}
        self._interrupts = 0
        self.reason: str | None = None
        """Why the run was asked to stop, None while it was not."""

    @property
    def requested(self) -> bool:
        """Whether the run should save and stop."""
        return self.reason is not None

    def __enter__(self) -> StopControl:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            # None means a handler that was not installed from Python; it cannot be put back, so the default is.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                self._restore()
                os._exit(130)
        if self.requested:
            return
        self.reason = name
        # A signal can arrive inside a write to the same stream; losing the message is better than losing the run.
        with contextlib.suppress(RuntimeError):
            again = "; interrupt again to stop at once" if number == signal.SIGINT else ""
            self._tell(f"{name}: saving a checkpoint and stopping after this step{again}")


class SourceFailed(OuroborosError):
    """Training stopped before a step because a source that is streamed cannot be read on."""


class NotFinite(OuroborosError):
    """Training stopped because losses or gradients stayed non-finite; ``batch`` is the last one."""

    def __init__(self, message: str, batch: np.ndarray) -> None:
        super().__init__(message)
        self.batch = batch
