"""Normalisation of the stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ouroboros.config.part import NormPart, part


@part(module="ouroboros.nn.norm:rms_norm_of")
@dataclass(frozen=True, kw_only=True)
class RMSNormSpec(NormPart):
    """RMS norm (Zhang & Sennrich 2019)."""

    kind: Literal["rms"] = "rms"
    gain: bool = True
    """Learn a factor for each channel."""

    def parameters(self, width: int) -> int:
        return width if self.gain else 0


@part(module="ouroboros.nn.norm:layer_norm_of")
@dataclass(frozen=True, kw_only=True)
class LayerNormSpec(NormPart):
    """Layer norm with a bias (Ba et al. 2016)."""

    kind: Literal["layer"] = "layer"

    def parameters(self, width: int) -> int:
        return 2 * width
