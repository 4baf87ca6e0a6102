"""Parts that only the published program has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ouroboros.config.part import part
from ouroboros.config.parts.values import ValueEmbeddingSpec

if TYPE_CHECKING:
    from ouroboros.config.model import ModelSpec


@part(module="ouroboros.systems.crawler.unconnected:UnconnectedValues")
@dataclass(frozen=True, kw_only=True)
class UnconnectedValuesSpec(ValueEmbeddingSpec):
    """A table of values that no block reads, as the published crawler stores one: its list of layers counts blocks of
    another model. It changes nothing and trains nothing; it is there for exact counts."""

    provides: ClassVar[str] = ""

    kind: Literal["unconnected_values"] = "unconnected_values"  # pyrefly: ignore[bad-override]
    factors: int = 2
    """Numbers by which blocks would multiply their values."""

    def check(self, model: ModelSpec) -> None:
        """Fits every model: nothing reads it."""

    def parameters(self, model: ModelSpec) -> int:
        return super().parameters(model) + self.factors

    def flops(self, model: ModelSpec) -> int:
        return 0
