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
