"""Residual connections that add. Shapes: B batch, T positions, D model width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ouroboros.config.parts.residual import AdditiveResidualSpec, NoResidualSpec, ScaledResidualSpec
from ouroboros.nn.part import Init, Residual, Started
from ouroboros.nn.visit import VisitContext


class AdditiveResidual(Residual):
    """``x + dropout(update)``, the residual connection of He et al. 2016. Has no parameters."""

    def __init__(self, spec: AdditiveResidualSpec, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None

    def forward(self, x_BTD: Tensor, update_BTD: Tensor, context_BTD: Tensor, read_BTD: Tensor) -> Tensor:
        """Join ``update`` (the sublayer's output) to the stream ``x``.

        Args:
            x_BTD: the stream.
            update_BTD: the sublayer's output.
            context_BTD: what the sublayer read (the normalised stream); gates of other kinds depend on it.
            read_BTD: the same before the norm.
        """
        return x_BTD + (update_BTD if self.dropout is None else self.dropout(update_BTD))


class ScaledResidual(Residual):
    """``x + s * dropout(update)`` with a learned factor for each channel."""

    PARAMETER_ROLES = {"scale": "vector"}

    def __init__(self, spec: ScaledResidualSpec, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None

    def reset_parameters(self, init: Init | None = None) -> None:
        """One."""
        nn.init.ones_(self.scale)

    @classmethod
    def entrance(cls, spec: Any, width: int) -> nn.Module | None:
        return StemMix(width) if spec.stem_mix else None

    def forward(self, x_BTD: Tensor, update_BTD: Tensor, context_BTD: Tensor, read_BTD: Tensor) -> Tensor:
        """Join ``update`` to the stream ``x``; see :class:`AdditiveResidual`."""
        update_BTD = update_BTD if self.dropout is None else self.dropout(update_BTD)
        return torch.addcmul(x_BTD, self.scale.to(x_BTD.dtype), update_BTD.to(x_BTD.dtype))


class StemMix(Started):
    """``r0 * x + r1 * x0`` with the stream at its start, ``x0``; a factor for each channel."""

    PARAMETER_ROLES = {"weight": "vector"}

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, width))
        self.reset_parameters()

    def reset_parameters(self, init: Init | None = None) -> None:
        """One for the stream, zero for its start."""
        nn.init.ones_(self.weight[0])
        nn.init.zeros_(self.weight[1])

    def forward(self, x_BTD: Tensor, visit: VisitContext) -> Tensor:
        """(B, T, D) to the same."""
        own_D, first_D = self.weight.to(x_BTD.dtype)
        assert visit.carried is not None
        return torch.addcmul(own_D * x_BTD, first_D, visit.carried["x0"])


class NoResidual(Residual):
    """The sublayer's output alone. Has no parameters."""

    def __init__(self, spec: NoResidualSpec, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None

    def forward(self, x_BTD: Tensor, update_BTD: Tensor, context_BTD: Tensor, read_BTD: Tensor) -> Tensor:
        """The update; see :class:`AdditiveResidual`."""
        return update_BTD if self.dropout is None else self.dropout(update_BTD)
