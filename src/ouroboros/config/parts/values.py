"""A table of values that attention adds to its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ouroboros.config.part import StemPart, part
from ouroboros.errors import check

if TYPE_CHECKING:
    from ouroboros.config.model import ModelSpec


@part(module="ouroboros.nn.values:ValueEmbedding")
@dataclass(frozen=True, kw_only=True)
class ValueEmbeddingSpec(StemPart):
    """A second table of token embeddings that is added to the values of attention, in blocks with
    ``mixer.value_embedding`` (value embeddings of the speed-run community)."""

    provides: ClassVar[str] = "values"

    kind: Literal["value_embedding"] = "value_embedding"
    width: int = 128
    """Numbers per token in the table; a linear map makes values of all key/value heads of them, unless they are as many
    already."""

    def __post_init__(self) -> None:
        check(self.width >= 1, f"stem.value_embedding.width must be >= 1, got {self.width}")

    def check(self, model: ModelSpec) -> None:
        check(
            any(self.provides in block.mixer.reads for block in model.blocks),
            "stem.value_embedding is a table that no block reads: give blocks --model.mixer.value-embedding, or leave"
            " the part out",
        )

    def values(self, model: ModelSpec) -> int:
        """Numbers in the values of all heads."""
        heads = model.block.mixer.heads(model.hidden_size)
        return heads.cached * heads.width

    def parameters(self, model: ModelSpec) -> int:
        return model.vocab_size * self.width + self._mapped(model) + 1

    def flops(self, model: ModelSpec) -> int:
        return 2 * self._mapped(model)

    def _mapped(self, model: ModelSpec) -> int:
        """Numbers in the map to values."""
        return 0 if self.width == self.values(model) else self.width * self.values(model)
