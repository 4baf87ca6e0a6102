"""What loops are told of the blocks before them. Shapes: B batch, T positions, D model width, W width of the tap."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ouroboros.config.parts.tap import TapSpec
from ouroboros.nn.part import LoopModule, Projection, ZeroProjection


class Tap(LoopModule):
    """``x + U_l [Q_1 e_1; Q_2 e_2; ...]`` with the outputs ``e`` of blocks before the loop; zero at the start."""

    PARAMETERS_BY_LOOP = True

    def __init__(self, spec: TapSpec, width: int, loops: int, norm_eps: float) -> None:
        super().__init__()
        self.blocks = spec.watches
        self.down = nn.ModuleList(Projection(width, spec.width, bias=False) for _ in self.blocks)
        rows = loops if spec.per_loop else 1
        self.up = nn.ModuleList(ZeroProjection(spec.width * len(self.blocks), width) for _ in range(rows))

    def enter(self, x: Tensor, carried: dict[str, Tensor], loop: int) -> Tensor:
        """The state with what was tapped added."""
        if "tap" not in carried:
            taps = [down(carried[f"block.{block}"]) for down, block in zip(self.down, self.blocks, strict=True)]
            carried["tap"] = torch.cat(taps, dim=-1)
        return x + self.up[min(loop, len(self.up) - 1)](carried["tap"])
