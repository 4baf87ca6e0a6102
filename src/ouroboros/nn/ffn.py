"""Position-wise feed-forward networks. Shapes: D model width, F hidden width."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ouroboros.nn.part import Projection
from ouroboros.nn.visit import VisitContext


class FeedForward(nn.Module):
    """``down(act(x))``; the activation by ``spec.kind``:

    * ``swiglu``: ``silu(gate x) * (up x)`` (Shazeer 2020)
    * ``geglu``: ``gelu_tanh(gate x) * (up x)`` (Shazeer 2020)
    * ``relu2``: ``relu(up x)^2`` (So et al. 2021)
    * ``leaky_relu2``: ``leaky_relu(up x, slope)^2``
    * ``gelu``: ``gelu(up x)``
    """

    OUTPUT_PROJECTIONS = ("down_proj",)

    def __init__(self, spec: Any, width: int) -> None:
        super().__init__()
        self.spec = spec
        if spec.gated:
            self.gate_proj = Projection(width, spec.intermediate_size, bias=spec.bias)
        self.up_proj = Projection(width, spec.intermediate_size, bias=spec.bias)
        self.down_proj = Projection(spec.intermediate_size, width, bias=spec.bias)
        self.dropout = nn.Dropout(spec.dropout) if spec.dropout > 0 else None

    def forward(self, x_D: Tensor, visit: VisitContext | None = None) -> Tensor:
        """Map (..., D) to (..., D), the same at every visit."""
        y_D = self.project("down_proj", self._hidden(x_D, visit), visit)
        return y_D if self.dropout is None else self.dropout(y_D)

    def project(self, name: str, x: Tensor, visit: VisitContext | None) -> Tensor:
        """What the linear map ``name`` makes of ``x``."""
        return getattr(self, name)(x)

    def _hidden(self, x_D: Tensor, visit: VisitContext | None) -> Tensor:
        up_F = self.project("up_proj", x_D, visit)
        if self.spec.kind == "geglu":
            return F.gelu(self.project("gate_proj", x_D, visit), approximate="tanh") * up_F
        if self.spec.gated:
            return F.silu(self.project("gate_proj", x_D, visit)) * up_F
        if self.spec.kind == "relu2":
            return F.relu(up_F).square()
        if self.spec.kind == "leaky_relu2":
            return F.leaky_relu(up_F, self.spec.negative_slope).square()
        return F.gelu(up_F)
