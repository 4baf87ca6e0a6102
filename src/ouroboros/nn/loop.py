"""Loop conditioning: what enters at loop boundaries. Shapes: B batch, T positions, D model width, L table rows.

Every part is optional; a part that is off has no parameters and no arithmetic. Where a part has neutral values
(embedding, injection, contractive step) it starts at them, and then computes bit for bit what its absence computes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ouroboros.config import LoopSpec
from ouroboros.nn.norm import rms_norm


class ConcatInjection(nn.Linear):
    """A learned map of ``[x; x0]`` to D channels; starts as the identity on ``x``."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(2 * hidden_size, hidden_size, bias=False)

    def reset_parameters(self) -> None:
        """Identity on ``x``, zero on ``x0``."""
        nn.init.eye_(self.weight)


class RecurrenceGate(nn.Linear):
    """Logits of the gate, (..., D), from ``[z; x]``; starts at the same ``bias`` everywhere."""

    def __init__(self, hidden_size: int, bias: float) -> None:
        self.starting_bias = bias
        super().__init__(2 * hidden_size, hidden_size)

    def reset_parameters(self) -> None:
        """Weight zero, bias at its starting value."""
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self.starting_bias)


class LoopParts(nn.Module):
    """The parts of one looped segment.

    One loop is ``z = blocks(enter(x, x0, l)); x = leave(x, z, l)`` where ``x0`` is the state before the first loop.

    Args:
        spec: which parts are on.
        hidden_size: D.
        loops: the segment's loop count; tables have ``spec.max_loops`` or this many rows, later loops use the last.
        eps: of the per-loop norm.
    """

    PARAMETER_ROLES = {"embedding": "vector", "norm": "vector"}

    def __init__(self, spec: LoopSpec, hidden_size: int, loops: int, eps: float) -> None:
        super().__init__()
        self.spec = spec
        self.rows = spec.max_loops or loops
        self.eps = eps
        if spec.embedding:
            self.embedding = nn.Parameter(torch.zeros(self.rows, hidden_size))
        if spec.norm:
            self.norm = nn.Parameter(torch.ones(self.rows, hidden_size))
        if spec.inject == "add":
            self.inject_scale = nn.Parameter(torch.zeros(hidden_size))
        elif spec.inject == "concat":
            self.inject_proj = ConcatInjection(hidden_size)
        if spec.gate:
            self.gate_proj = RecurrenceGate(hidden_size, spec.gate_bias)

    def reset_parameters(self) -> None:
        """Set this module's own tables to their starting values; the maps inside have a method of this name too."""
        if self.spec.embedding:
            nn.init.zeros_(self.embedding)
        if self.spec.norm:
            nn.init.ones_(self.norm)
        if self.spec.inject == "add":
            nn.init.zeros_(self.inject_scale)

    def enter(self, x_BTD: Tensor, x0_BTD: Tensor, loop: int) -> Tensor:
        """The state that enters loop ``loop``: injection, then the loop's embedding."""
        if self.spec.inject == "add":
            x_BTD = x_BTD + self.inject_scale.to(x_BTD.dtype) * x0_BTD
        elif self.spec.inject == "concat":
            x_BTD = self.inject_proj(torch.cat((x_BTD, x0_BTD), dim=-1)).to(x_BTD.dtype)
        if self.spec.embedding:
            x_BTD = x_BTD + self.embedding[self._row(loop)].to(x_BTD.dtype)
        return x_BTD

    def leave(self, x_BTD: Tensor, z_BTD: Tensor, loop: int) -> Tensor:
        """The state after loop ``loop``: its norm, then gate, then contractive step from the previous state ``x``."""
        if self.spec.norm:
            gain = self.norm[self._row(loop)].float()
            z_BTD = rms_norm(z_BTD.float(), gain, self.eps, once=self.training).to(z_BTD.dtype)
        if self.spec.gate:
            gate = torch.sigmoid(self.gate_proj(torch.cat((z_BTD, x_BTD), dim=-1)).float()).to(z_BTD.dtype)
            z_BTD = gate * z_BTD + (1 - gate) * x_BTD
        if self.spec.contractive < 1:
            z_BTD = torch.lerp(x_BTD, z_BTD, self.spec.contractive)
        return z_BTD

    def _row(self, loop: int) -> int:
        return min(loop, self.rows - 1)
