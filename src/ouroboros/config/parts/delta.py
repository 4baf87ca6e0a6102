"""The delta residual of Deep Delta Learning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ouroboros.config.needs import needs, several, untried
from ouroboros.config.part import ResidualPart, part
from ouroboros.errors import check

if TYPE_CHECKING:
    from ouroboros.config.model import ModelSpec


@part(module="ouroboros.nn.delta:DeltaResidual")
@dataclass(frozen=True, kw_only=True)
class DeltaSpec(ResidualPart):
    """The delta residual ``X + b k (v - k.X)``: along the sublayer's direction ``k``, erase and write (Deep Delta
    Learning, arXiv 2601.00417)."""

    kind: Literal["delta"] = "delta"
    values: int = 1
    """Value channels of the state: 1 is a vector of hidden_size, more are as many of them (the paper's d_v)."""
    compressor: Literal["channel", "token"] = field(default="channel", metadata=needs("values", several))
    """What a sublayer reads of an expanded state: a mixture of its value channels, or of the last tokens too."""
    kernel: int = field(default=4, metadata=needs("values", several))
    """Taps of the compressor: along the value channels, or over tokens."""
    compressor_init: Literal["average", "normal"] = field(default="average", metadata=needs("values", several))
    """The compressors' filters at the start: the mean of the value channels, or drawn like every weight (as published,
    which makes the first states so small that the norms' eps decides their size)."""
    embedding_conv: bool = field(default=False, metadata=needs("values", several))
    """Start an expanded state with a causal convolution over the embeddings instead of copies of each."""
    embedding_kernel: int = field(default=4, metadata=needs("embedding_conv", True))
    """Taps of that convolution, tokens."""
    gate: Literal["linear", "two_layer"] = "linear"
    """The map that the gate b comes from: one linear map, or two with ``tanh`` between them."""
    gate_hidden: int = field(default=128, metadata=needs("gate", "two_layer"))
    """Width of the two-layer gate's hidden layer."""
    beta_init: float = 1.0
    """The gate b in (0, 2) at the start: 0 keeps, 1 overwrites along k, 2 reflects."""
    value: Literal["sigmoid", "linear", "constant"] = "sigmoid"
    """The target v: ``value_scale * sigmoid(W x)``, ``W x``, or ``value_constant``."""
    value_scale: float = field(default=4.0, metadata=needs("value", "sigmoid"))
    """Upper end of the target with ``value`` sigmoid."""
    value_constant: float = field(default=2.0, metadata=needs("value", "constant"))
    """The target with ``value`` constant."""
    guard: Literal["additive", "clamped"] = field(
        default="additive", metadata=untried("acts on directions that are about as short as eps")
    )
    """Of the direction: ``h / sqrt(|h|^2 + eps^2)``, or ``h / max(|h|, eps)`` (the earliest form)."""
    eps: float = 1e-6
    """Of the guard."""
    erase: bool = True
    """False writes ``b k v`` and erases nothing: the control arm."""

    def __post_init__(self) -> None:
        for name in ("values", "kernel", "embedding_kernel", "gate_hidden"):
            check(getattr(self, name) >= 1, f"residual.{name} must be >= 1, got {getattr(self, name)}")
        check(0 <= self.beta_init <= 2, f"residual.beta_init must be in [0, 2], got {self.beta_init}")
        check(self.eps > 0, f"residual.eps must be > 0, got {self.eps}")
        check(self.value_scale > 0, f"residual.value_scale must be > 0, got {self.value_scale}")
        check(
            self.values == 1 or self.compressor == "token" or self.kernel >= self.values,
            f"residual.kernel ({self.kernel}) must be at least residual.values ({self.values}) with the channel"
            " compressor: a smaller one leaves value channels unread",
        )
        check(
            self.values > 1 or not (self.embedding_conv or self.compressor == "token"),
            "residual.embedding_conv and residual.compressor are parts of the expanded state: set residual.values to"
            " more than 1 (published: 4) or leave them out",
        )

    @property
    def frozen_gate(self) -> bool:
        """Whether the gate starts where its derivative is almost 0, so that it hardly learns."""
        return min(self.beta_init, 2 - self.beta_init) < 1e-3

    @property
    def expanded(self) -> bool:
        """Whether the state has several value channels."""
        return self.values > 1

    @property
    def form(self) -> str:
        return f"{self.values} vectors" if self.expanded else "vector"

    @property
    def channels(self) -> int:
        return self.values

    def check(self, model: ModelSpec) -> None:
        check(
            not model.zero_init_outputs,
            "zero_init_outputs starts every sublayer's output at 0, where the delta residual's direction has a gradient"
            " of 1 / residual.eps: leave it off",
        )

    def warnings(self, model: ModelSpec) -> Iterator[str]:
        if self.frozen_gate:
            yield (
                f"residual.beta_init {self.beta_init:g} starts the gates where their derivative is almost 0, so they do"
                " not learn; for a start near the identity take 0.01 to 0.1"
            )

    def parameters(self, width: int) -> int:
        gate = width + 1 if self.gate == "linear" else (width + 1) * self.gate_hidden + 1
        return gate + ((width + 1) * self.values if self.value != "constant" else 0)

    def flops(self, width: int) -> int:
        gate = width if self.gate == "linear" else (width + 1) * self.gate_hidden
        erased = width * self.values if self.expanded and self.erase else 0  # of a vector state an elementwise sum
        return 2 * (gate + (width * self.values if self.value != "constant" else 0) + erased)

    def reader_parameters(self, width: int) -> int:
        if not self.expanded:
            return 0
        return width * self.kernel * (self.values if self.compressor == "token" else 1) + self.values

    def reader_values(self, width: int) -> int:
        return (self.kernel - 1) * self.values * width if self.expanded and self.compressor == "token" else 0

    def start_parameters(self, width: int) -> int:
        return width * self.values * self.embedding_kernel if self.expanded and self.embedding_conv else 0

    def start_values(self, width: int) -> int:
        return (self.embedding_kernel - 1) * width if self.expanded and self.embedding_conv else 0
