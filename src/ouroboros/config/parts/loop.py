"""What enters at the boundaries of a loop: shipped loop parts.

One loop is ``z = blocks(enter(x)); x = leave(x, z)``. Parts enter and leave in the order of the list; on the command
line that is the order of this file, behind halting, which has a file of its own: what adds to the state comes before
what damps the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ouroboros.config.part import LoopPart, part
from ouroboros.errors import check

if TYPE_CHECKING:
    from ouroboros.config.model import ModelSpec


@dataclass(frozen=True, kw_only=True)
class TablePart(LoopPart):
    """A loop part with a row of ``hidden_size`` numbers for every loop."""

    rows: int | None = None
    """Rows of the table; None means the layout's loops. Later loops use the last row."""

    def __post_init__(self) -> None:
        check(self.rows is None or self.rows >= 1, f"loop.{self.kind}.rows must be >= 1, got {self.rows}")

    def parameters(self, width: int, loops: int) -> int:
        return (self.rows or loops) * width


@part(module="ouroboros.nn.flow:Flow")
@dataclass(frozen=True, kw_only=True)
class FlowSpec(LoopPart):
    """Adds an instruction for each loop, which depends on the state: ``x + U_l P x`` with a shared P of few rows and a
    map ``U_l`` for each loop, zero at the start."""

    kind: Literal["flow"] = "flow"
    rank: int = 32
    """Rows of P."""

    def __post_init__(self) -> None:
        check(self.rank >= 1, f"loop.flow.rank must be >= 1, got {self.rank}")

    @classmethod
    def neutral(cls) -> tuple[LoopPart, ...]:
        return (cls(),)

    def parameters(self, width: int, loops: int) -> int:
        return (1 + loops) * self.rank * width

    def flops(self, width: int, loops: int) -> int:
        return loops * 4 * self.rank * width


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

    def flops(self, width: int, loops: int) -> int:
        return 0 if self.mode == "add" else loops * 4 * width * width


@part(module="ouroboros.nn.loop:LoopEmbedding")
@dataclass(frozen=True, kw_only=True)
class LoopEmbeddingSpec(TablePart):
    """A learned vector for each loop, added to the state that enters it; zero at the start."""

    kind: Literal["embedding"] = "embedding"

    @classmethod
    def neutral(cls) -> tuple[LoopPart, ...]:
        return (cls(),)


@part(module="ouroboros.nn.flow:LoopSmear")
@dataclass(frozen=True, kw_only=True)
class LoopSmearSpec(LoopPart):
    """Mixes what a loop has produced with what the loop before produced, ``(1 - g) z + g previous``, with a learned
    ``g = sigmoid(gate)`` for each channel; before the first loop stands the state that enters it."""

    kind: Literal["loop_smear"] = "loop_smear"
    start: float = 0.0
    """The gate before its sigmoid, at the start: 0 mixes both in equal parts, as published; at -20 the state stays as
    it is to seven digits."""

    def parameters(self, width: int, loops: int) -> int:
        return width


@part(module="ouroboros.nn.flow:Anchor")
@dataclass(frozen=True, kw_only=True)
class AnchorSpec(LoopPart):
    """Hands a few numbers of each token from loop to loop: loop l adds ``R_l W_{l-1} z_{l-1}`` to the state that enters
    it, where ``z_{l-1}`` is what the loop before produced; R is zero at the start."""

    kind: Literal["anchor"] = "anchor"
    width: int = 32
    """Numbers that are handed on."""

    def __post_init__(self) -> None:
        check(self.width >= 1, f"loop.anchor.width must be >= 1, got {self.width}")

    @classmethod
    def neutral(cls) -> tuple[LoopPart, ...]:
        return (cls(),)

    def check(self, model: ModelSpec) -> None:
        check(
            all(segment.loops > 1 for segment in model.schedule.segments if segment.looped),
            f"loop.anchor hands something from loop to loop: give every loop of layout {model.layout!r} at least two,"
            " or leave the part out",
        )

    def parameters(self, width: int, loops: int) -> int:
        return (loops - 1) * 2 * self.width * width

    def flops(self, width: int, loops: int) -> int:
        return (loops - 1) * 4 * self.width * width


@part(module="ouroboros.nn.hyper:HyperConnections")
@dataclass(frozen=True, kw_only=True)
class HyperSpec(LoopPart):
    """Hyper-connections between loops (Hyperloop, arXiv 2604.21254): several streams remember what earlier loops
    produced. Each loop is written to every stream and read from it with weights that depend on the streams."""

    kind: Literal["hyper"] = "hyper"
    streams: int = 4
    """How many states are kept beside the one that blocks see."""

    def __post_init__(self) -> None:
        check(self.streams >= 1, f"loop.hyper.streams must be >= 1, got {self.streams}")

    @classmethod
    def neutral(cls) -> tuple[LoopPart, ...]:
        return (cls(),)

    def parameters(self, width: int, loops: int) -> int:
        return loops * (3 * self.streams * (self.streams * width + 1) + width)

    def flops(self, width: int, loops: int) -> int:
        return loops * 6 * self.streams * self.streams * width


@part(module="ouroboros.nn.loop:LoopNorm")
@dataclass(frozen=True, kw_only=True)
class LoopNormSpec(TablePart):
    """RMS norm of the state that a loop has produced, with a gain for each loop (Controller, section 2.5)."""

    kind: Literal["norm"] = "norm"
    eps: float | None = None
    """Added to the mean square before its root is taken; None means what the norms of blocks add."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.eps is None or self.eps > 0, f"loop.norm.eps must be > 0 or null, got {self.eps}")


@dataclass(frozen=True, kw_only=True)
class _GatePart(LoopPart):
    """A gate for each channel, of the states before and behind a loop."""

    def parameters(self, width: int, loops: int) -> int:
        return 2 * width * width + width

    def flops(self, width: int, loops: int) -> int:
        return loops * 4 * width * width


@part(module="ouroboros.nn.loop:RecurrenceGate")
@dataclass(frozen=True, kw_only=True)
class RecurrenceGateSpec(_GatePart):
    """Gated recurrence ``x <- g * z + (1 - g) * x`` with ``g = sigmoid(W [z; x] + b)``, W = 0 at the start."""

    kind: Literal["gate"] = "gate"
    bias: float = -2.0
    """The bias ``b`` at the start, the same in every channel."""


@part(module="ouroboros.nn.loop:UpdateGate")
@dataclass(frozen=True, kw_only=True)
class UpdateGateSpec(_GatePart):
    """Scales what each loop changes, ``x + g * (z - x)``, by ``g = 2 sigmoid(W [z; x] + b)``, which is 1 at the
    start."""

    kind: Literal["update_gate"] = "update_gate"

    @classmethod
    def neutral(cls) -> tuple[LoopPart, ...]:
        return (cls(),)


@part(module="ouroboros.nn.loop:LoopGain")
@dataclass(frozen=True, kw_only=True)
class LoopGainSpec(LoopPart):
    """Scales what each loop changes, ``x + k_l (z - x)``, by a learned gain that is 1 at the start."""

    kind: Literal["gain"] = "gain"
    form: Literal["scalar", "channel", "rms"] = "scalar"
    """One gain for each loop, one for each of its channels, or none: ``rms`` brings the change of every token to a mean
    square of 1."""

    @classmethod
    def neutral(cls) -> tuple[LoopPart, ...]:
        return cls(form="scalar"), cls(form="channel")

    def parameters(self, width: int, loops: int) -> int:
        return loops * {"scalar": 1, "channel": width, "rms": 0}[self.form]


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


@part(module="ouroboros.nn.bridge:Bridge")
@dataclass(frozen=True, kw_only=True)
class BridgeSpec(LoopPart):
    """Adds an affine map of two states behind the last loop, the one that leaves it and the one that entered the first:
    ``z + W [z; x0] + b``, where W and b are zero at the start."""

    kind: Literal["bridge"] = "bridge"

    @classmethod
    def neutral(cls) -> tuple[LoopPart, ...]:
        return (cls(),)

    def parameters(self, width: int, loops: int) -> int:
        return 2 * width * width + width

    def flops(self, width: int, loops: int) -> int:
        return 4 * width * width
