"""Topologies: how visits are wired."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ouroboros.config.part import TopologyPart, part
from ouroboros.errors import check
from ouroboros.schedule import Schedule, Segment, Visit

if TYPE_CHECKING:
    from ouroboros.config.model import ModelSpec


@part(module="ouroboros.nn.topology:Chain")
@dataclass(frozen=True, kw_only=True)
class ChainSpec(TopologyPart):
    """Blocks one after the other; looped segments repeat, with loop parts at their boundaries."""

    kind: Literal["chain"] = "chain"


@part(module="ouroboros.nn.unet:UNet")
@dataclass(frozen=True, kw_only=True)
class UNetSpec(TopologyPart):
    """Skip connections from the first half of the visits outside of loops to the second, in reverse order, as in a
    U-net (Ronneberger et al. 2015); a learned factor for each channel, 1 at the start."""

    kind: Literal["unet"] = "unet"
    skips: int | None = None
    """Skip connections; None means half of the visits outside of loops."""

    def __post_init__(self) -> None:
        check(self.skips is None or self.skips >= 0, f"topology.skips must be >= 0 or null, got {self.skips}")

    def paired(self, schedule: Schedule) -> list[Visit]:
        """The visits of which early ones are connected with late ones."""
        visits = iter(schedule.visits)
        return [
            visit
            for segment in schedule.segments
            for visit in [next(visits) for _ in range(segment.num_blocks * segment.loops)]
            if self.pairs(segment)
        ]

    def pairs(self, segment: Segment) -> bool:
        """Whether visits of a segment are among them."""
        return not segment.looped

    def count(self, model: ModelSpec) -> int:
        """Skip connections, resolved."""
        return len(self.paired(model.schedule)) // 2 if self.skips is None else self.skips

    def check(self, model: ModelSpec) -> None:
        super().check(model)
        most = len(self.paired(model.schedule)) // 2
        check(
            self.count(model) <= most,
            f"topology.skips is {self.skips}, but layout {model.layout!r} has {most} pairs of visits to connect",
        )
        check(
            most > 0 or self.skips == 0,
            f"topology {self.kind} connects blocks outside of loops in pairs, and layout {model.layout!r} has none:"
            " write for example '2 (1)x2 2'",
        )
        check(
            model.block.residual.channels == 1,
            f"topology {self.kind} needs a residual whose stream is one vector for each token",
        )

    def parameters(self, model: ModelSpec) -> int:
        return self.count(model) * model.hidden_size
