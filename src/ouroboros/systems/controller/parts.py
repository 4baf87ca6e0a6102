"""Parts of the first generation, whose Controller makes whole low-rank matrices instead of diagonals.

A *generated* map computes ``y = W x + alpha / rank * B A x``, where ``A = sum_n a_n A1_n A2_n`` and ``B = sum_n b_n
B1_n B2_n`` (section 6.2). The factors, the *bases*, belong to the block; the coefficients a and b come from the loop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ouroboros.config.part import FeedForwardPart, part
from ouroboros.config.parts.attention import AttentionSpec
from ouroboros.config.parts.feed_forward import FeedForwardSpec
from ouroboros.config.parts.modulated import TARGETS
from ouroboros.config.parts.pooling import PooledPart
from ouroboros.errors import check

if TYPE_CHECKING:
    from ouroboros.config.model import ModelSpec

COEFFICIENTS = "coefficients"
"""What the loop part hands to generated maps."""


@dataclass(frozen=True, kw_only=True)
class _GeneratedMaps:
    """What attention and feed-forward networks with generated maps have in common."""

    rank: int = 16
    """Rank of the addition to each map."""
    alpha: float = 32.0
    """The addition is multiplied by ``alpha / rank``."""
    bases: int = 8
    """Products of two matrices that A, and as many that B, is a weighted sum of."""
    divisor: int = 48
    """The two matrices of such a product meet in as many numbers as the map has inputs (for B: outputs), divided by
    this."""

    def check_maps(self, family: str) -> None:
        """Refuse sizes that are none."""
        for name in ("rank", "bases", "divisor"):
            check(getattr(self, name) >= 1, f"{family}.{name} must be >= 1, got {getattr(self, name)}")
        check(self.alpha > 0, f"{family}.alpha must be > 0, got {self.alpha}")

    def inner(self, channels: int) -> int:
        """Numbers in which the two matrices of a product meet."""
        return max(1, channels // self.divisor)

    def numbers(self, inputs: int, outputs: int) -> int:
        """Numbers in the bases of one map."""
        inner, outer = self.inner(inputs), self.inner(outputs)
        return self.bases * (inner * (self.rank + inputs) + outer * (self.rank + outputs))


@part(module="ouroboros.systems.controller.generated:GeneratedAttention")
@dataclass(frozen=True, kw_only=True)
class GeneratedAttentionSpec(_GeneratedMaps, AttentionSpec):
    """Attention whose maps to queries, keys, values and output get additions that the loop generates; visits outside of
    a loop get none."""

    kind: Literal["generated_attention"] = "generated_attention"  # pyrefly: ignore[bad-override]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_maps("mixer")

    def check(self, model: ModelSpec) -> None:
        super().check(model)
        _check_generated(model)

    @property
    def unlooped(self) -> AttentionSpec:
        names = [field.name for field in dataclasses.fields(AttentionSpec) if field.name != "kind"]
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        return AttentionSpec(**options)

    def bases_parameters(self, width: int) -> int:
        """Numbers in the bases of all maps."""
        queries, keys = self.num_heads * self.head_width(width), self.kv_heads * self.head_width(width)
        return self.numbers(width, queries) + 2 * self.numbers(width, keys) + self.numbers(queries, width)

    def parameters(self, width: int) -> int:
        return super().parameters(width) + self.bases_parameters(width)

    def loop_flops(self, width: int) -> int:
        return 2 * self.bases_parameters(width)


@part(module="ouroboros.systems.controller.generated:GeneratedFeedForward")
@dataclass(frozen=True, kw_only=True)
class GeneratedFeedForwardSpec(_GeneratedMaps, FeedForwardPart):
    """A gated feed-forward network, ``down(silu(gate x) * (up x))``, whose three maps get additions that the loop
    generates; visits outside of a loop get none."""

    gated: ClassVar[bool] = True

    kind: Literal["generated_swiglu"] = "generated_swiglu"
    intermediate_size: int = 512
    """Width of the hidden layer."""
    bias: bool = False
    """Add biases to all maps."""
    dropout: float = 0.0
    """Dropout of the network's output in training, besides that of every sublayer (``model.dropout``)."""

    def __post_init__(self) -> None:
        check(self.intermediate_size >= 1, f"ffn.intermediate_size must be >= 1, got {self.intermediate_size}")
        check(0 <= self.dropout < 1, f"ffn.dropout must be in [0, 1), got {self.dropout}")
        self.check_maps("ffn")

    def check(self, model: ModelSpec) -> None:
        _check_generated(model)

    @property
    def hidden_width(self) -> int:
        return self.intermediate_size

    @property
    def unlooped(self) -> FeedForwardSpec:
        return FeedForwardSpec(intermediate_size=self.intermediate_size, bias=self.bias, dropout=self.dropout)

    def bases_parameters(self, width: int) -> int:
        """Numbers in the bases of all maps."""
        inner = self.intermediate_size
        return 2 * self.numbers(width, inner) + self.numbers(inner, width)

    def parameters(self, width: int) -> int:
        return self.unlooped.parameters(width) + self.bases_parameters(width)

    def flops(self, width: int) -> int:
        return self.unlooped.flops(width)

    def loop_flops(self, width: int) -> int:
        return 2 * self.bases_parameters(width)


@part(module="ouroboros.systems.controller.generated:MatrixController")
@dataclass(frozen=True, kw_only=True)
class MatrixControllerSpec(PooledPart):
    """The Controller of the first generation: a network that makes the coefficients of whole low-rank matrices, of the
    state that begins a loop, of the loop's number, and of how far tokens have halted."""

    hands: ClassVar[str] = COEFFICIENTS

    kind: Literal["matrix_controller"] = "matrix_controller"
    bases: int = 8
    """Coefficients for A, and as many for B, of each map: the ``bases`` of the generated maps of the blocks."""
    start: Literal["b_zero", "saddle"] = "b_zero"
    """Which coefficients start at zero: those of B, so that additions are zero and can be learned; or those of A and B,
    as published. Then the gradient of each factor is a multiple of the other one, and both stay at zero for ever."""
    state: int = 512
    """Numbers that the state is mapped to."""
    steps: int = 256
    """Numbers that the loop's number is embedded in."""
    rows: int | None = None
    """Rows of the table of loops; None means the layout's loops. Later loops use the last row."""
    confidence: int = 0
    """Numbers that the probability with which a token has halted so far is mapped to; 0 leaves it out. Without the loop
    part ``halt`` that probability is zero."""
    hidden: int = 1024
    """Width of the two hidden layers."""
    style: int = 64
    """Numbers that the coefficients are made of."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bases", "state", "steps", "hidden", "style"):
            check(getattr(self, name) >= 1, f"loop.matrix_controller.{name} must be >= 1, got {getattr(self, name)}")
        check(self.confidence >= 0, f"loop.matrix_controller.confidence must be >= 0, got {self.confidence}")
        check(self.rows is None or self.rows >= 1, f"loop.matrix_controller.rows must be >= 1, got {self.rows}")

    def check(self, model: ModelSpec) -> None:
        super().check(model)
        others = [part.kind for part in model.loop if part.hands and part.kind != self.kind]
        check(not others, f"loop.matrix_controller and loop.{''.join(others)} both steer the loop: leave one out")
        wide = model.block.residual.channels > 1
        check(not wide, "loop.matrix_controller needs a residual whose stream is one vector: --model.residual additive")
        looped = {number for segment in model.schedule.segments if segment.looped for number in segment.blocks}
        for number in sorted(looped):
            for name, found in (("mixer", model.blocks[number].mixer), ("ffn", model.blocks[number].ffn)):
                kind = {"mixer": "generated_attention", "ffn": "generated_swiglu"}[name]
                check(
                    isinstance(found, _GeneratedMaps),
                    f"loop.matrix_controller needs generated maps in every looped block, and {name} of block {number}"
                    f" is {found.kind!r}: name the loop in the layout, as in '1 loop:(1)x2 1', and give"
                    f" --model.at.loop.{name} {kind}",
                )
                bases = getattr(found, "bases", None)
                check(
                    bases == self.bases,
                    f"loop.matrix_controller.bases is {self.bases}, and {name}.bases of block {number} {bases}: they"
                    " must agree",
                )

    def warnings(self, model: ModelSpec) -> Iterator[str]:
        yield from super().warnings(model)
        if self.start == "saddle":
            yield (
                "loop.matrix_controller.start 'saddle', as published, gives the Controller and the bases no gradient,"
                " so they never learn"
            )
        if self.confidence and not any(part.kind == "halt" for part in model.loop):
            yield (
                "loop.matrix_controller.confidence is about halting, and without loop.halt no token does: some"
                " parameters of the Controller get no gradient"
            )

    def parameters(self, width: int, loops: int) -> int:
        biases = self.state + self.confidence + 2 * self.hidden + self.style
        return biases + (self.rows or loops) * self.steps + self.matrices(width)

    def matrices(self, width: int) -> int:
        read, hidden = self.state + self.steps + self.confidence, self.hidden
        network = self.state * width + self.confidence + hidden * (read + hidden + self.style)
        return network + len(TARGETS) * 2 * self.bases * self.style

    def recent_values(self, width: int) -> int:
        return super().recent_values(width + (self.confidence > 0))


def _check_generated(model: ModelSpec) -> None:
    """Generated maps need a loop that generates them, in every block that has them."""
    looped = {number for segment in model.schedule.segments if segment.looped for number in segment.blocks}
    for number, block in enumerate(model.blocks):
        for name, found in (("mixer", block.mixer), ("ffn", block.ffn)):
            if isinstance(found, _GeneratedMaps):
                check(
                    number in looped,
                    f"{name} of block {number} is generated by a loop, and no loop visits that block: name the loop in"
                    f" the layout, as in '1 loop:(1)x2 1', and give the option as --model.at.loop.{name}",
                )
                check(
                    any(part.hands == COEFFICIENTS for part in model.loop),
                    f"{name} of block {number} needs what makes its coefficients: --model.loop.matrix-controller",
                )
