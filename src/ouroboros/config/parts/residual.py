"""The residual connection that adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ouroboros.config.part import ResidualPart, part


@part(module="ouroboros.nn.residual:AdditiveResidual")
@dataclass(frozen=True, kw_only=True)
class AdditiveResidualSpec(ResidualPart):
    """``x + update`` (He et al. 2016)."""

    kind: Literal["additive"] = "additive"


@part(module="ouroboros.nn.residual:ScaledResidual")
@dataclass(frozen=True, kw_only=True)
class ScaledResidualSpec(ResidualPart):
    """``x + s * update`` with a learned factor for each channel, which is 1 at the start."""

    kind: Literal["scaled"] = "scaled"
    stem_mix: bool = False
    """Begin every block with ``r0 * x + r1 * x0``, where ``x0`` is the stream at its start; a factor for each channel,
    1 and 0 at the start."""

    def parameters(self, width: int) -> int:
        return width

    def entrance_parameters(self, width: int) -> int:
        return 2 * width if self.stem_mix else 0


@part(module="ouroboros.nn.residual:NoResidual")
@dataclass(frozen=True, kw_only=True)
class NoResidualSpec(ResidualPart):
    """What a sublayer returns replaces the stream; for blocks that only carry something from one stream to another."""

    kind: Literal["none"] = "none"
