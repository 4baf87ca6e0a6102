"""What is done to the token embeddings before the first visit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ouroboros.config.part import StemPart, part

if TYPE_CHECKING:
    from ouroboros.config.model import ModelSpec


@part(module="ouroboros.nn.stem:EmbeddingNorm")
@dataclass(frozen=True, kw_only=True)
class EmbeddingNormSpec(StemPart):
    """RMS norm of the token embeddings, without a gain."""

    kind: Literal["norm"] = "norm"


@part(module="ouroboros.nn.stem:LearnedPositions")
@dataclass(frozen=True, kw_only=True)
class LearnedPositionsSpec(StemPart):
    """A learned vector for each of ``max_position_embeddings`` positions, added to the embeddings; mixers then rotate
    nothing."""

    replaces_rotary: ClassVar[bool] = True

    kind: Literal["positions"] = "positions"

    def parameters(self, model: ModelSpec) -> int:
        return model.max_position_embeddings * model.hidden_size

    def longest(self, model: ModelSpec) -> int | None:
        return model.max_position_embeddings
