"""What loops are told of the blocks before them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self

from ouroboros.config.needs import needs
from ouroboros.config.part import LoopPart, Place, part
from ouroboros.errors import check

if TYPE_CHECKING:
    from ouroboros.config.model import ModelSpec


@part(module="ouroboros.nn.tap:Tap")
@dataclass(frozen=True, kw_only=True)
class TapSpec(LoopPart):
    """Every loop is given narrow projections of what the blocks before the loop returned (the encoder tap of the
    crawler); they are made once, and mapped to the stream by a matrix that is zero at the start."""

    kind: Literal["tap"] = "tap"
    width: int = 32
    """Numbers that are kept of each block's output."""
    layers: Literal["all", "first", "deepest"] = field(default="all", metadata=needs("blocks", None))
    """Which of the blocks before the loop are tapped."""
    per_loop: bool = True
    """A map to the stream for each loop; otherwise one for all."""
    blocks: tuple[int, ...] | None = None
    """The tapped blocks by number, instead of ``layers``."""

    def __post_init__(self) -> None:
        check(self.width >= 1, f"loop.tap.width must be >= 1, got {self.width}")

    def at(self, place: Place) -> Self:
        before = tuple(range(place.segment.first_block))
        chosen = {"all": before, "first": before[:1], "deepest": before[-1:]}[self.layers]
        return self.replace(blocks=chosen) if self.blocks is None else self

    def check(self, model: ModelSpec) -> None:
        first = min((s.first_block for s in model.schedule.segments if s.looped), default=0)
        tapped = range(first) if self.blocks is None else self.blocks
        check(
            len(tapped) > 0 and all(0 <= block < first for block in tapped),
            f"loop.tap needs blocks before every loop (here {first} of them, numbered from 0): write the layout for"
            " example '2 (1)x2 2'",
        )
        check(model.block.residual.channels == 1, "loop.tap needs a residual whose stream is one vector for each token")

    @property
    def watches(self) -> tuple[int, ...]:
        return self.blocks or ()

    @classmethod
    def neutral(cls) -> tuple[LoopPart, ...]:
        return (cls(),)

    def parameters(self, width: int, loops: int) -> int:
        tapped = self.width * len(self.watches)
        return width * tapped * (1 + (loops if self.per_loop else 1))

    def flops(self, width: int, loops: int) -> int:
        return (1 + loops) * 2 * width * self.width * len(self.watches)
