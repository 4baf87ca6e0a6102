"""A feed-forward network with a narrow passage for each loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Self

from ouroboros.config.needs import needs
from ouroboros.config.part import FeedForwardPart, Place, part
from ouroboros.errors import check


@part(module="ouroboros.nn.choke:ChokedFeedForward")
@dataclass(frozen=True, kw_only=True)
class ChokeSpec(FeedForwardPart):
    """A feed-forward network whose way back to the stream is narrow and has maps of its own for each loop."""

    kind: Literal["choke"] = "choke"
    intermediate_size: int = 512
    """Width of the hidden layer, which all loops share."""
    shape: Literal["flat", "pyramid", "pyramid_residual", "grouped", "residual"] = "flat"
    """``flat``: down from the hidden layer and up to the stream. ``pyramid``: a shared layer of the stream's width
    before. ``pyramid_residual``: that layer is also added to the result. ``grouped``: down in groups of channels.
    ``residual``: a shared linear map past the narrow passage is added."""
    choke_size: int = 64
    """Width of the passage."""
    groups: int = field(default=8, metadata=needs("shape", "grouped"))
    """Groups of channels of the hidden layer and of the passage."""
    activation: Literal["relu2", "leaky_relu2"] = "relu2"
    """Of the hidden layer and the passage: the square of a rectifier, or of a leaky one."""
    negative_slope: float = field(default=0.5, metadata=needs("activation", "leaky_relu2"))
    """Slope of ``leaky_relu2`` below zero."""
    loops: int | None = None
    """Loops that have maps of their own, the last of which later loops use; None means as many as the layout has."""

    def __post_init__(self) -> None:
        for name in ("intermediate_size", "choke_size", "groups"):
            check(getattr(self, name) >= 1, f"ffn.{name} must be >= 1, got {getattr(self, name)}")
        check(self.loops is None or self.loops >= 1, f"ffn.loops must be >= 1 or null, got {self.loops}")
        divides = self.intermediate_size % self.groups == self.choke_size % self.groups == 0
        check(
            self.shape != "grouped" or divides,
            f"ffn.groups ({self.groups}) must divide ffn.intermediate_size ({self.intermediate_size}) and"
            f" ffn.choke_size ({self.choke_size})",
        )

    def at(self, place: Place) -> Self:
        return self.replace(loops=place.segment.loops) if self.loops is None else self

    @property
    def hidden_width(self) -> int:
        return self.intermediate_size

    @property
    def has_stage(self) -> bool:
        """Whether a shared layer of the stream's width stands before the passage."""
        return self.shape in ("pyramid", "pyramid_residual")

    def _passage(self, width: int) -> int:
        """Numbers in the maps of one loop."""
        before = width if self.has_stage else self.intermediate_size
        return self.choke_size * (before // (self.groups if self.shape == "grouped" else 1) + width)

    def _shared(self, width: int) -> int:
        return width * self.intermediate_size * (1 + (self.has_stage or self.shape == "residual"))

    def parameters(self, width: int) -> int:
        return self._shared(width) + (self.loops or 1) * self._passage(width)

    def flops(self, width: int) -> int:
        return 2 * (self._shared(width) + self._passage(width))
