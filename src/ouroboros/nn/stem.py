"""Shipped stem parts: what is done to the token embeddings. Shapes: B batch, T positions, D model width."""

from __future__ import annotations

from torch import Tensor, nn

from ouroboros.config import ModelSpec
from ouroboros.config.parts import stem as specs
from ouroboros.nn.part import Started
from ouroboros.nn.visit import VisitContext


class EmbeddingNorm(Started):
    """RMS norm without a gain. Has no parameters."""

    def __init__(self, spec: specs.EmbeddingNormSpec, model: ModelSpec) -> None:
        super().__init__()
        self.eps = model.block.norm.eps

    def forward(self, x_BTD: Tensor, ids_BT: Tensor | None, visit: VisitContext) -> Tensor:
        """Normalise (B, T, D)."""
        return nn.functional.rms_norm(x_BTD, x_BTD.shape[-1:], eps=self.eps)


class LearnedPositions(nn.Embedding):
    """Adds a vector for each position of the text, registers not counted."""

    def __init__(self, spec: specs.LearnedPositionsSpec, model: ModelSpec) -> None:
        super().__init__(model.max_position_embeddings, model.hidden_size)
        self.registers = model.registers

    def forward(self, x_BTD: Tensor, ids_BT: Tensor | None, visit: VisitContext) -> Tensor:  # pyrefly: ignore
        """(B, T, D) to the same."""
        assert visit.positions is not None
        return x_BTD + super().forward(visit.positions - self.registers).to(x_BTD.dtype)
