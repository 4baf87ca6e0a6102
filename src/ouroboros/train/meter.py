"""Rates of a run: what the metrics and the progress line say about speed."""

from __future__ import annotations

import math
from typing import Any

from ouroboros.train.log import Status
from ouroboros.train.loop import StepResult, Trainer
from ouroboros.train.precision import matmul_peak


class Meter:
    """Turns step results into metric records and progress lines; rates are means since the last record."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.peak = matmul_peak(trainer.device.type, trainer.dtype) * trainer.workers.world_size
        self._seconds, self._tokens = trainer.counters.seconds, trainer.counters.tokens

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
            progress=self.trainer.budget.progress(c.step, c.tokens, c.seconds),
            loss=result.loss,
            bits_per_byte=self.bits_per_byte(result.loss),
            tokens_per_second=self.rate,
            peak_share=self.peak_share(),
            note=f"{c.skipped} steps skipped" if c.skipped else "",
        )
