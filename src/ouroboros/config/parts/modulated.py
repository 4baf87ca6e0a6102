"""Linear maps that a loop modulates: a low-rank addition whose diagonal another part hands to each visit.

A modulated map computes ``y = W x + alpha / rank * B (m * A x)`` (Controller, section 2.3). A and B belong to the
block; the diagonal m comes from a loop part, which makes it of the state that a loop begins with, or learns it for each
loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ouroboros.config.part import FeedForwardPart, LoopPart, part
from ouroboros.config.parts.attention import AttentionSpec
from ouroboros.config.parts.feed_forward import FeedForwardSpec
from ouroboros.config.parts.pooling import PooledPart
from ouroboros.errors import check

if TYPE_CHECKING:
    from ouroboros.config.model import ModelSpec

DIAGONALS = "diagonals"
"""What loop parts hand to modulated maps."""
MIXER_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN_TARGETS = ("gate_proj", "up_proj", "down_proj")
TARGETS = (*MIXER_TARGETS, *FFN_TARGETS)
"""The modulated maps of a block, in the order of the published tables."""


@part(module="ouroboros.nn.modulated:ModulatedAttention")
@dataclass(frozen=True, kw_only=True)
class ModulatedAttentionSpec(AttentionSpec):
    """Attention whose maps to queries, keys, values and output are modulated by the loop."""

    kind: Literal["modulated_attention"] = "modulated_attention"  # pyrefly: ignore[bad-override]
    rank: int = 32
    """Rank of the addition to each map."""
    alpha: float = 16.0
    """The addition is multiplied by ``alpha / rank``."""
    bases: Literal["frozen", "trained"] = "frozen"
    """Whether A and B stay as they are, as published, or are trained."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bases("mixer", self.rank, self.alpha)

    def check(self, model: ModelSpec) -> None:
        super().check(model)
        _check_modulation(model)

    @property
    def freezes(self) -> bool:
        return self.bases == "frozen"

    def bases_parameters(self, width: int) -> int:
        """Numbers in A and B of all maps."""
        queries, keys = self.num_heads * self.head_width(width), self.kv_heads * self.head_width(width)
        return self.rank * (2 * (width + queries) + 2 * (width + keys))

    def matrices(self, width: int) -> int:
        return super().matrices(width) + self.bases_parameters(width)


@part(module="ouroboros.nn.modulated:ModulatedFeedForward")
@dataclass(frozen=True, kw_only=True)
class ModulatedFeedForwardSpec(FeedForwardPart):
    """A gated feed-forward network, ``down(silu(gate x) * (up x))``, whose three maps are modulated by the loop."""

    gated: ClassVar[bool] = True

    kind: Literal["modulated_swiglu"] = "modulated_swiglu"
    intermediate_size: int = 512
    """Width of the hidden layer."""
    bias: bool = False
    """Add biases to all maps."""
    dropout: float = 0.0
    """Dropout of the network's output in training, besides that of every sublayer (``model.dropout``)."""
    rank: int = 32
    """Rank of the addition to each map."""
    alpha: float = 16.0
    """The addition is multiplied by ``alpha / rank``."""
    bases: Literal["frozen", "trained"] = "frozen"
    """Whether A and B stay as they are, as published, or are trained."""

    def __post_init__(self) -> None:
        check(self.intermediate_size >= 1, f"ffn.intermediate_size must be >= 1, got {self.intermediate_size}")
        check(0 <= self.dropout < 1, f"ffn.dropout must be in [0, 1), got {self.dropout}")
        _check_bases("ffn", self.rank, self.alpha)

    def check(self, model: ModelSpec) -> None:
        _check_modulation(model)

    @property
    def freezes(self) -> bool:
        return self.bases == "frozen"

    @property
    def hidden_width(self) -> int:
        return self.intermediate_size

    @property
    def _plain(self) -> FeedForwardSpec:
        return FeedForwardSpec(intermediate_size=self.intermediate_size, bias=self.bias, dropout=self.dropout)

    def bases_parameters(self, width: int) -> int:
        """Numbers in A and B of all maps."""
        return 3 * self.rank * (width + self.intermediate_size)

    def parameters(self, width: int) -> int:
        return self._plain.parameters(width) + self.bases_parameters(width)

    def flops(self, width: int) -> int:
        return self._plain.flops(width) + 2 * self.bases_parameters(width)


@dataclass(frozen=True, kw_only=True)
class _DiagonalsPart(LoopPart):
    """A loop part that hands a diagonal for every modulated map."""

    hands: ClassVar[str] = DIAGONALS

    rank: int = 32
    """Numbers of each diagonal: the ``rank`` of the modulated maps of the blocks."""
    rows: int | None = None
    """Rows of the table of loops; None means the layout's loops. Later loops use the last row."""

    def __post_init__(self) -> None:
        check(self.rank >= 1, f"loop.{self.kind}.rank must be >= 1, got {self.rank}")
        check(self.rows is None or self.rows >= 1, f"loop.{self.kind}.rows must be >= 1, got {self.rows}")

    def check(self, model: ModelSpec) -> None:
        others = [part.kind for part in model.loop if part.hands == self.hands and part.kind != self.kind]
        check(not others, f"loop.{self.kind} and loop.{''.join(others)} both hand diagonals: leave one of them out")
        wide = model.block.residual.channels > 1
        check(not wide, f"loop.{self.kind} needs a residual whose stream is one vector: --model.residual additive")
        for number in _looped(model):
            block = model.blocks[number]
            for name, found in (("mixer", block.mixer), ("ffn", block.ffn)):
                kind = {"mixer": "modulated_attention", "ffn": "modulated_swiglu"}[name]
                check(
                    isinstance(found, ModulatedAttentionSpec | ModulatedFeedForwardSpec),
                    f"loop.{self.kind} needs modulated maps in every looped block, and {name} of block {number} is"
                    f" {found.kind!r}: name the loop in the layout, as in '1 loop:(1)x2 1', and give"
                    f" --model.at.loop.{name} {kind}",
                )
                rank = getattr(found, "rank", None)
                check(
                    rank == self.rank,
                    f"loop.{self.kind}.rank is {self.rank}, and {name}.rank of block {number} {rank}: they must agree",
                )


@part(module="ouroboros.nn.modulated:StaticDiagonals")
@dataclass(frozen=True, kw_only=True)
class StaticDiagonalsSpec(_DiagonalsPart):
    """A learned diagonal for each loop and each modulated map, the same for every text; zero at the start."""

    kind: Literal["static_diagonals"] = "static_diagonals"

    def parameters(self, width: int, loops: int) -> int:
        return (self.rows or loops) * len(TARGETS) * self.rank


@part(module="ouroboros.nn.modulated:Controller")
@dataclass(frozen=True, kw_only=True)
class ControllerSpec(_DiagonalsPart, PooledPart):
    """A small network that makes the diagonals of each loop of the state that begins it and of the loop's number; zero
    at the start (Ouroboros, arXiv 2604.02051)."""

    kind: Literal["controller"] = "controller"
    style: int = 128
    """Numbers that the loop's number is embedded in, and that the diagonals are made of."""

    def __post_init__(self) -> None:
        _DiagonalsPart.__post_init__(self)
        PooledPart.__post_init__(self)
        check(self.style >= 1, f"loop.controller.style must be >= 1, got {self.style}")

    def check(self, model: ModelSpec) -> None:
        _DiagonalsPart.check(self, model)
        PooledPart.check(self, model)

    def parameters(self, width: int, loops: int) -> int:
        s = self.style
        vectors = 2 * s + (self.rows or loops) * s + 2 * s + s
        return vectors + self.matrices(width)

    def matrices(self, width: int) -> int:
        s = self.style
        return width * 2 * s + 3 * s * 2 * s + 2 * s * s + len(TARGETS) * s * self.rank


def _check_bases(family: str, rank: int, alpha: float) -> None:
    check(rank >= 1, f"{family}.rank must be >= 1, got {rank}")
    check(alpha > 0, f"{family}.alpha must be > 0, got {alpha}")


def _looped(model: ModelSpec) -> set[int]:
    return {block for segment in model.schedule.segments if segment.looped for block in segment.blocks}


def _check_modulation(model: ModelSpec) -> None:
    """Modulated maps need someone who hands them diagonals, in every block that has them."""
    looped = _looped(model) - {b for segment in model.schedule.segments if not segment.looped for b in segment.blocks}
    for number, block in enumerate(model.blocks):
        for name, found in (("mixer", block.mixer), ("ffn", block.ffn)):
            if isinstance(found, ModulatedAttentionSpec | ModulatedFeedForwardSpec):
                check(
                    number in looped,
                    f"{name} {found.kind!r} of block {number} is modulated by a loop, and is visited outside of one:"
                    " name the loop in the layout, as in '1 loop:(1)x2 1', and give the option as --model.at.loop."
                    f"{name}",
                )
                check(
                    any(part.hands == DIAGONALS for part in model.loop),
                    f"{name} {found.kind!r} of block {number} needs a loop part that hands it diagonals:"
                    " --model.loop.controller or --model.loop.static-diagonals",
                )
