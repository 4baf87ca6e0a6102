"""Halting: what leaves a loop is a mean of its states, weighted for each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ouroboros.config.part import LoopPart, part
from ouroboros.errors import check


@part(module="ouroboros.nn.halt:Halt")
@dataclass(frozen=True, kw_only=True)
class HaltSpec(LoopPart):
    """Each token halts when the probabilities that its states give add up to one (adaptive computation time, arXiv
    1603.08983); what leaves the last loop is the mean of its states with these weights. Every loop is computed."""

    kind: Literal["halt"] = "halt"
    hidden: int = 256
    """Width of the two hidden layers of the network that gives the probability."""
    bias: float = -2.0
    """What it gives before its sigmoid at the start; with -2 a token halts in the ninth loop."""

    def __post_init__(self) -> None:
        check(self.hidden >= 1, f"loop.halt.hidden must be >= 1, got {self.hidden}")

    def parameters(self, width: int, loops: int) -> int:
        return self._matrices(width) + 2 * self.hidden + 1

    def flops(self, width: int, loops: int) -> int:
        return loops * 2 * self._matrices(width)

    def _matrices(self, width: int) -> int:
        return width * self.hidden + self.hidden * self.hidden + self.hidden
