"""Halting: what leaves a loop is a mean of its states, weighted for each token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ouroboros.config.needs import needs, untried
from ouroboros.config.part import LoopPart, part
from ouroboros.errors import check


@part(module="ouroboros.nn.halt:Halt")
@dataclass(frozen=True, kw_only=True)
class HaltSpec(LoopPart):
    """Each token halts when the probabilities that its states give add up to one (adaptive computation time, arXiv
    1603.08983); what leaves the last loop is the mean of its states with these weights."""

    kind: Literal["halt"] = "halt"
    hidden: int = 256
    """Width of the two hidden layers of the network that gives the probability."""
    bias: float = -2.0
    """What it gives before its sigmoid at the start; with -2 a token halts in the ninth loop."""
    freeze: bool = field(default=True, metadata=untried("acts only where a token halts before others do"))
    """Leave a token that has halted as it is: its state does not change any more, later loops attend to the keys and
    values that it had when it halted, and generating text skips its work. Without, all tokens are computed in every
    loop and attended to with ever newer states, as published, and no work is saved."""
    cost: Literal["none", "steps", "geometric"] = "none"
    """What training adds to the loss. ``steps`` is a token's number of steps and the weight of its last state (adaptive
    computation time), which is lower the earlier it halts. ``geometric`` is the divergence of its weights from a
    geometric distribution that is cut at the last loop (PonderNet, arXiv 2107.05407)."""
    cost_weight: float = field(default=0.01, metadata=needs("cost", "steps", "geometric"))
    """By what the cost is multiplied; it is a mean over tokens."""
    prior: float = field(default=0.2, metadata=needs("cost", "geometric"))
    """The probability of halting in each loop of the geometric distribution: a token should take about one step divided
    by it."""

    def __post_init__(self) -> None:
        check(self.hidden >= 1, f"loop.halt.hidden must be >= 1, got {self.hidden}")
        check(self.cost_weight > 0, f"loop.halt.cost_weight must be > 0, got {self.cost_weight}; cost none has no cost")
        check(0 < self.prior < 1, f"loop.halt.prior must be between 0 and 1, got {self.prior}")

    @property
    def saves(self) -> bool:
        return self.freeze

    def parameters(self, width: int, loops: int) -> int:
        return self._matrices(width) + 2 * self.hidden + 1

    def flops(self, width: int, loops: int) -> int:
        return loops * 2 * self._matrices(width)

    def _matrices(self, width: int) -> int:
        return width * self.hidden + self.hidden * self.hidden + self.hidden
