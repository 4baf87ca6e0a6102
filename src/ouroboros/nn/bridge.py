"""An affine map behind a loop. Shapes: D model width, ``...`` the leading axes."""

from __future__ import annotations

import torch
from torch import Tensor

from ouroboros.config.parts.loop import BridgeSpec
from ouroboros.nn.part import LoopModule, ZeroProjection


class Bridge(LoopModule):
    """``z + W [z; x0] + b``: what blocks behind the loop are given instead of z.

    Layers that were removed from a model can be replaced by an affine map that least squares finds (ReplaceMe,
    arXiv 2505.02819; LLM-Streamline, arXiv 2403.19135); :mod:`ouroboros.convert.bridge` does. The map is of a
    difference, so that it is neutral at zero.
    """

    def __init__(self, spec: BridgeSpec, width: int, loops: int, norm_eps: float) -> None:
        super().__init__()
        self.proj = ZeroProjection(2 * width, width, bias=0.0)

    def finish(self, z: Tensor, carried: dict[str, Tensor]) -> Tensor:
        """The last state and what the map adds to it, (..., D)."""
        return z + self.proj(torch.cat((z, carried["x0"]), dim=-1)).to(z.dtype)
