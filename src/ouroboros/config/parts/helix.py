"""Two streams that run side by side, and the attention between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from ouroboros.config.needs import needs
from ouroboros.config.part import Heads, MixerPart, part
from ouroboros.config.parts.attention import AttentionSpec
from ouroboros.config.parts.topology import UNetSpec
from ouroboros.errors import check
from ouroboros.schedule import Schedule, Segment

if TYPE_CHECKING:
    from ouroboros.config.model import ModelSpec


@part(module="ouroboros.nn.helix:Helix")
@dataclass(frozen=True, kw_only=True)
class HelixSpec(UNetSpec):
    """Two streams: a U-net of blocks, and beside it shared blocks that run again and again on a stream of their own.
    Whenever the shared blocks run, each stream gives the other a hint; at the end the second is added to the first.

    The layout says when: in ``1 second:1 1 second 1 second`` the segment ``second`` runs after each of three blocks.
    """

    kind: Literal["helix"] = "helix"  # pyrefly: ignore[bad-override]
    stream: str = "second"
    """Name of the segment that runs on the second stream."""
    bridges: Literal["linear", "attention"] = "linear"
    """What a hint is: a narrow linear map of the other stream, or attention to it, by blocks with the mixer ``cross``:
    the segment ``up`` looks from the second stream at the first and the segment ``down`` back, both before ``second``.
    """
    bridge_width: int = field(default=32, metadata=needs("bridges", "linear"))
    """Width of the linear bridges."""
    merge: Literal["linear", "sigmoid"] = "linear"
    """The second stream is added with a learned factor for each channel, zero at the start, when the model therefore
    computes what it would without it; or with the ``sigmoid`` of one, which is a half at the start."""
    merge_cap: float | None = field(default=None, metadata=needs("merge", "sigmoid"))
    """Largest factor; None means 1."""
    hint_cap: float | None = None
    """Hints become ``c * tanh(hint / c)`` with this ``c``; None leaves them."""
    visit_embedding: Literal["none", "each", "halves"] = "none"
    """Add a learned vector to the second stream each time it runs: one for every time, or one for every time in the
    first half of the blocks and one more for the second half, as published."""
    skip_gate: bool = False
    """Multiply each skip by ``sigmoid`` of a learned map of the second stream to one number, 0.88 at the start."""
    skip_after_hint: bool = False
    """Save the U-net's skips behind the hints of the second stream instead of before."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.bridge_width >= 1, f"topology.bridge_width must be >= 1, got {self.bridge_width}")
        for name in ("merge_cap", "hint_cap"):
            value = getattr(self, name)
            check(value is None or value > 0, f"topology.{name} must be > 0 or null, got {value}")
        check((self.merge_cap or 0) <= 1, f"topology.merge_cap must be <= 1 or null, got {self.merge_cap}")

    def pairs(self, segment: Segment) -> bool:
        return not segment.looped and segment.name not in (self.stream, *self.bridge_names)

    def runs_second(self, segment: Segment) -> bool:
        """Whether a segment runs on the second stream; a loop of its blocks is one of the first."""
        return segment.name == self.stream and not segment.looped

    @property
    def bridge_names(self) -> tuple[str, ...]:
        """Names of the segments that make hints."""
        return ("up", "down") if self.bridges == "attention" else ()

    def check(self, model: ModelSpec) -> None:
        super().check(model)
        segments, hint = model.schedule.segments, "see docs/systems/crawler.md"
        names = [segment.name for segment in segments if not (segment.looped or self.pairs(segment))]
        check(
            self.stream in names,
            f"topology helix: layout {model.layout!r} has no segment {self.stream!r}, the second stream's: write for"
            f" example '1 {self.stream}:1 1 {self.stream}'",
        )
        wanted = [*self.bridge_names, self.stream] * names.count(self.stream)
        check(
            names == wanted,
            f"topology helix: in layout {model.layout!r} the segments {', '.join(map(repr, self.bridge_names))} must"
            f" stand before each {self.stream!r}; {hint}",
        )
        for name in self.bridge_names:
            looks = all(model.blocks[block].mixer.reads_other for block in model.schedule.blocks_at(name))
            check(looks, f"topology.bridges attention: {name!r} needs --model.at.{name}.mixer cross; {hint}")

    def crossed(self, model: ModelSpec) -> frozenset[int]:
        named = (self.stream, *self.bridge_names)
        return frozenset(b for s in model.schedule.stored if s.name in named and not s.looped for b in s.blocks)

    def times(self, schedule: Schedule) -> int:
        """How often the second stream's blocks run."""
        return sum(self.runs_second(segment) for segment in schedule.segments)

    def rows(self, schedule: Schedule) -> int:
        """Vectors of ``visit_embedding``."""
        return 0 if self.visit_embedding == "none" else self.times(schedule)

    def parameters(self, model: ModelSpec) -> int:
        width = model.hidden_size
        bridges = 4 * width * self.bridge_width if self.bridges == "linear" else 0
        gate = width + 1 if self.skip_gate else 0
        return super().parameters(model) + gate + bridges + width * (1 + self.rows(model.schedule))

    def flops(self, model: ModelSpec, schedule: Schedule) -> int:
        bridges = 8 * model.hidden_size * self.bridge_width if self.bridges == "linear" else 0
        return bridges * self.times(schedule) + (2 * model.hidden_size * self.count(model) if self.skip_gate else 0)


@part(module="ouroboros.nn.cross:CrossAttention")
@dataclass(frozen=True, kw_only=True)
class CrossSpec(MixerPart):
    """Causal attention of one head from one stream to another, without positions; zero at the start."""

    reads_other: ClassVar[bool] = True

    kind: Literal["cross"] = "cross"
    width: int = 32
    """Channels of the head."""

    def __post_init__(self) -> None:
        check(self.width >= 1, f"mixer.width must be >= 1, got {self.width}")

    def heads(self, width: int) -> Heads:
        return Heads(1, 1, self.width)

    def parameters(self, width: int) -> int:
        return 4 * width * self.width

    def flops(self, width: int, context: int, registers: int = 0) -> int:
        return 8 * width * self.width + 4 * (context + registers) * self.width

    def cache_values(self, width: int) -> int:
        return 2 * self.width

    @property
    def own_attention(self) -> str:
        return "looks at another stream"


@part(module="ouroboros.nn.cross:SplitAttention")
@dataclass(frozen=True, kw_only=True)
class SplitAttentionSpec(AttentionSpec):
    """Attention whose last heads look at another stream: its keys, which are not rotated, and its values come from the
    same maps. Each kind of head has its own share of the key/value heads."""

    reads_other: ClassVar[bool] = True

    kind: Literal["split"] = "split"  # pyrefly: ignore[bad-override]
    cross_heads: int = 1
    """Query heads that look at the other stream."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            1 <= self.cross_heads <= self.num_heads,
            f"mixer.cross_heads must be in 1..mixer.num_heads ({self.num_heads}), got {self.cross_heads}",
        )
        own, kv = self.num_heads - self.cross_heads, self.own_kv_heads
        fits = own == 0 or (own % kv == 0 and kv < self.kv_heads and self.cross_heads % (self.kv_heads - kv) == 0)
        check(
            fits,
            f"mixer.cross_heads {self.cross_heads} leaves {own} query heads with {kv} key/value heads and"
            f" {self.cross_heads} with {self.kv_heads - kv}, which do not divide: choose another number of heads",
        )

    @property
    def own_attention(self) -> str:
        return "looks at another stream"

    @property
    def own_kv_heads(self) -> int:
        """Key/value heads of the token's own stream."""
        own = self.num_heads - self.cross_heads
        return max(1, own * self.kv_heads // self.num_heads) if own else 0

    def flops(self, width: int, context: int, registers: int = 0) -> int:
        again = 2 * self.kv_heads * self.head_width(width)  # keys and values of the other stream
        return super().flops(width, context, registers) + 2 * width * again
