"""Position-wise feed-forward networks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ouroboros.config.needs import needs
from ouroboros.config.part import FeedForwardPart, part
from ouroboros.errors import check


@part(module="ouroboros.nn.ffn:FeedForward")
@dataclass(frozen=True, kw_only=True)
class FeedForwardSpec(FeedForwardPart):
    """Two linear maps with an activation between them, or three with a gate: ``silu(gate x) * (up x)``,
    ``gelu(gate x) * (up x)``, ``relu(up x)^2``, ``leaky_relu(up x)^2`` or ``gelu(up x)``. The gate's ``gelu`` is the
    approximation by a hyperbolic tangent."""

    kind: Literal["swiglu", "geglu", "relu2", "leaky_relu2", "gelu"] = "swiglu"
    intermediate_size: int = 512
    """Width of the hidden layer."""
    bias: bool = False
    """Add biases to all maps."""
    negative_slope: float = field(default=0.5, metadata=needs("kind", "leaky_relu2"))
    """Slope of ``leaky_relu2`` below zero."""
    dropout: float = 0.0
    """Dropout of the network's output in training, besides that of every sublayer (``model.dropout``)."""

    def __post_init__(self) -> None:
        check(self.intermediate_size >= 1, f"ffn.intermediate_size must be >= 1, got {self.intermediate_size}")
        check(0 <= self.dropout < 1, f"ffn.dropout must be in [0, 1), got {self.dropout}")

    @property
    def gated(self) -> bool:
        """Whether a third map makes a gate."""
        return self.kind in ("swiglu", "geglu")

    @property
    def hidden_width(self) -> int:
        return self.intermediate_size

    def parameters(self, width: int) -> int:
        matrices = 3 if self.gated else 2
        biases = (matrices - 1) * self.intermediate_size + width if self.bias else 0
        return matrices * width * self.intermediate_size + biases

    def flops(self, width: int) -> int:
        return 2 * (3 if self.gated else 2) * width * self.intermediate_size


@part(module=None)
@dataclass(frozen=True, kw_only=True)
class NoFeedForwardSpec(FeedForwardPart):
    """No feed-forward network: a block is its mixer alone."""

    absent: ClassVar[bool] = True

    kind: Literal["none"] = "none"

    def parameters(self, width: int) -> int:
        return 0

    def flops(self, width: int) -> int:
        return 0
