"""Rates of a run: what the metrics and the progress line say about speed."""

from __future__ import annotations

import math
import time
from typing import Any

from ouroboros.train.log import Status
from ouroboros.train.precision import matmul_peak
from ouroboros.train.stop import share_done
from ouroboros.train.threads import Window
from ouroboros.train.trainer import StepResult, Trainer

WINDOW_SECONDS, WINDOW_STEPS = 5.0, 5
"""What one look at the throughput covers, at least."""


class Meter:
    """Turns step results into metric records and progress lines; rates are means since the last record."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.peak = matmul_peak(trainer.device.type, trainer.dtype) * trainer.workers.world_size
        self._seconds, self._tokens = trainer.counters.seconds, trainer.counters.tokens
        self._window = Window(WINDOW_SECONDS, WINDOW_STEPS)
        self._window_processor = time.process_time()
        self._best, self._warned = 0.0, False

    @property
    def rate(self) -> float:
        """Training tokens per second since the last record."""
        c = self.trainer.counters
        return (c.tokens - self._tokens) / max(c.seconds - self._seconds, 1e-9)

    def bits_per_byte(self, loss: float) -> float:
        """A training loss in bits per byte, by the mean bytes of a training token."""
        return loss / math.log(2) / self.trainer.bytes_per_token

    def peak_share(self) -> float:
        """Operations per second as a share of the measured matrix-product peak."""
        return self.rate * self.trainer.flops_per_token / self.peak

    def record(self, result: StepResult) -> dict[str, Any]:
        """The metrics of a step; starts a new interval for the rates."""
        c = self.trainer.counters
        values = {
            "kind": "train",
            "step": c.step,
            "tokens": c.tokens,
            "seconds": round(c.seconds, 3),
            "loss": result.loss,
            "bits_per_byte": self.bits_per_byte(result.loss),
            "lr": result.lr_factor * self.trainer.recipe.optim.lr,
            "grad_norm": result.grad_norm,
            "loops": result.loops,
            "skipped": c.skipped,
            "tokens_per_second": self.rate,
            "peak_share": self.peak_share(),
        }
        if self.trainer.recipe.optim.momentum_cycle is not None:
            values["beta1"] = result.beta
        self._seconds, self._tokens = c.seconds, c.tokens
        return values

    def status(self, result: StepResult) -> Status:
        """The progress line of a step."""
        c = self.trainer.counters
        return Status(
            step=c.step,
            progress=share_done(self.trainer.recipe.train, c.step, c.tokens, c.seconds),
            loss=result.loss,
            bits_per_byte=self.bits_per_byte(result.loss),
            tokens_per_second=self.rate,
            peak_share=self.peak_share(),
            note=f"{c.skipped} steps skipped" if c.skipped else "",
        )

    def slowed(self, result: StepResult) -> str | None:
        """A line for people when the throughput of the last seconds is under half of the best seen, else None.

        Only steps are looked at, not validation between them; a step of more loops counts for more. The line is said
        once, and again after the throughput has recovered meanwhile.
        """
        rate = self._window.rate(result.seconds, self.trainer.visits(result.loops))
        if rate is None:
            return None
        now = time.process_time()
        share = (now - self._window_processor) / self._window.took
        self._window_processor = now
        self._best = max(self._best, rate)
        slow, before = rate < 0.5 * self._best, self._warned
        self._warned = slow or (before and rate < 0.8 * self._best)
        if not slow or before:
            return None
        threads = self.trainer.choices.threads_now or self.trainer.choices.threads
        return (
            f"other programs use the processor: training runs at {rate / self._best:.0%} of its best speed so far"
            f" and had {share:.1f} of {threads} processor{'s' * (threads != 1)}; it goes on"
        )
