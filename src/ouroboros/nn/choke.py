"""A feed-forward network with a narrow passage for each loop.

Shapes: D model width, F hidden width, C width of the passage, G groups, ``...`` the leading axes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ouroboros.config.parts.choke import ChokeSpec
from ouroboros.nn.part import Init, Projection, Started, ZeroProjection
from ouroboros.nn.visit import VisitContext


class ChokedFeedForward(Started):
    """With ``h = act(up x)`` of all loops and the maps ``d``, ``u`` of one loop, by ``spec.shape``:

    * ``flat``: ``u act(d h)``
    * ``pyramid``: ``u act(d s)`` with ``s = act(stage h)``, of the stream's width
    * ``pyramid_residual``: ``s + u act(d s)``
    * ``grouped``: as flat, with ``d`` block-diagonal
    * ``residual``: ``bypass h + u act(d h)``
    """

    OUTPUT_PROJECTIONS = ("bypass",)
    PARAMETER_ROLES = {"group_down": "vector"}
    PARAMETERS_BY_LOOP = True

    def __init__(self, spec: ChokeSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        hidden, loops = spec.intermediate_size, spec.loops or 1
        self.up_proj = Projection(width, hidden, bias=False)
        if spec.has_stage:
            self.stage = Projection(hidden, width, bias=False)
        if spec.shape == "residual":
            self.bypass = Projection(hidden, width, bias=False)
        before = width if spec.has_stage else hidden
        if spec.shape == "grouped":
            shape = (loops, spec.groups, hidden // spec.groups, spec.choke_size // spec.groups)
            self.group_down = nn.Parameter(torch.empty(shape))
            self.reset_parameters()
        else:
            self.choke_down = nn.ModuleList(Projection(before, spec.choke_size, bias=False) for _ in range(loops))
        self.choke_up = nn.ModuleList(ZeroProjection(spec.choke_size, width) for _ in range(loops))

    def reset_parameters(self, init: Init | None = None) -> None:
        """The matrices of groups."""
        if self.spec.shape == "grouped":
            nn.init.normal_(self.group_down, std=0.02)

    def forward(self, x_D: Tensor, visit: VisitContext | None = None) -> Tensor:
        """Map (..., D) to (..., D) with the maps of the visit's loop."""
        loop = 0 if visit is None or visit.visit is None else min(visit.visit.loop, len(self.choke_up) - 1)
        h_F = self._activate(self.up_proj(x_D))
        s = self._activate(self.stage(h_F)) if self.spec.has_stage else h_F
        y_D = self.choke_up[loop](self._activate(self._down(s, loop)))
        if self.spec.shape == "pyramid_residual":
            return s + y_D
        return self.bypass(h_F) + y_D if self.spec.shape == "residual" else y_D

    def _down(self, x: Tensor, loop: int) -> Tensor:
        """Into the passage, (..., C)."""
        if self.spec.shape != "grouped":
            return self.choke_down[loop](x)
        x_GF = x.unflatten(-1, (self.spec.groups, -1))
        return torch.einsum("...gf,gfc->...gc", x_GF, self.group_down[loop].to(x.dtype)).flatten(-2)

    def _activate(self, x: Tensor) -> Tensor:
        slope = self.spec.negative_slope if self.spec.activation == "leaky_relu2" else 0.0
        return F.leaky_relu(x, slope).square() if slope else F.relu(x).square()
