"""What enters at the boundaries of a loop: shipped loop parts.

One loop is ``z = blocks(enter(x)); x = leave(x, z)``. Parts enter and leave in the order of the list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ouroboros.config.part import LoopPart, part
from ouroboros.errors import check


@dataclass(frozen=True, kw_only=True)
class TablePart(LoopPart):
    """A loop part with a row of ``hidden_size`` numbers for every loop."""

    rows: int | None = None
    """Rows of the table; None means the layout's loops. Later loops use the last row."""

    def __post_init__(self) -> None:
        check(self.rows is None or self.rows >= 1, f"loop.{self.kind}.rows must be >= 1, got {self.rows}")

    def parameters(self, width: int, loops: int) -> int:
        return (self.rows or loops) * width


@part(module="ouroboros.nn.loop:Injection")
@dataclass(frozen=True, kw_only=True)
class InjectionSpec(LoopPart):
    """The state that entered the first loop enters every loop again."""

    injects: ClassVar[bool] = True

    kind: Literal["inject"] = "inject"
    mode: Literal["add", "concat"] = "add"
    """``x + s * x0`` with a learned per-channel ``s`` (zero at the start), or a learned map of ``[x; x0]`` (identity on
    ``x`` at the start)."""

    @classmethod
    def neutral(cls) -> tuple[LoopPart, ...]:
        return cls(mode="add"), cls(mode="concat")

    def parameters(self, width: int, loops: int) -> int:
        return width if self.mode == "add" else 2 * width * width

    def flops(self, width: int) -> int:
        return 0 if self.mode == "add" else 4 * width * width


@part(module="ouroboros.nn.loop:LoopEmbedding")
@dataclass(frozen=True, kw_only=True)
class LoopEmbeddingSpec(TablePart):
    """A learned vector for each loop, added to the state that enters it; zero at the start."""

    kind: Literal["embedding"] = "embedding"

    @classmethod
    def neutral(cls) -> tuple[LoopPart, ...]:
        return (cls(),)


@part(module="ouroboros.nn.loop:LoopNorm")
@dataclass(frozen=True, kw_only=True)
class LoopNormSpec(TablePart):
    """RMS norm of the state that a loop has produced, with a gain for each loop (Controller, section 2.5)."""

    kind: Literal["norm"] = "norm"


@part(module="ouroboros.nn.loop:RecurrenceGate")
@dataclass(frozen=True, kw_only=True)
class RecurrenceGateSpec(LoopPart):
    """Gated recurrence ``x <- g * z + (1 - g) * x`` with ``g = sigmoid(W [z; x] + b)``, W = 0 at the start."""

    kind: Literal["gate"] = "gate"
    bias: float = -2.0
    """The bias ``b`` at the start, the same in every channel."""

    def parameters(self, width: int, loops: int) -> int:
        return 2 * width * width + width

    def flops(self, width: int) -> int:
        return 4 * width * width


@part(module="ouroboros.nn.loop:ContractiveStep")
@dataclass(frozen=True, kw_only=True)
class ContractiveStepSpec(LoopPart):
    """Contractive step ``x <- (1 - dt) x + dt z``."""

    kind: Literal["contractive"] = "contractive"
    step: float = 0.5
    """The step ``dt`` in (0, 1]; 1 is the same as no such part."""

    def __post_init__(self) -> None:
        check(0 < self.step <= 1, f"loop.contractive must be in (0, 1], got {self.step}")

    @classmethod
    def neutral(cls) -> tuple[LoopPart, ...]:
        return (cls(step=1.0),)
