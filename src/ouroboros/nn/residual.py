"""The residual connection that adds."""

from __future__ import annotations

from torch import Tensor, nn

from ouroboros.config.parts.residual import AdditiveResidualSpec
from ouroboros.nn.part import Residual


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
