"""Heads: from final states to logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ouroboros.config.part import HeadPart, part
from ouroboros.errors import check


@part(module="ouroboros.nn.head:LinearHead")
@dataclass(frozen=True, kw_only=True)
class LinearHeadSpec(HeadPart):
    """Logits are the product with the output matrix, scaled and capped."""

    kind: Literal["linear"] = "linear"
    logit_scale: float = 1.0
    """Factor of the logits."""
    logit_softcap: float | None = None
    """Logits become ``c * tanh(logits / c)`` with this ``c``; None leaves them."""

    def __post_init__(self) -> None:
        check(
            self.logit_softcap is None or self.logit_softcap > 0,
            f"head.logit_softcap must be > 0 or null, got {self.logit_softcap}",
        )
