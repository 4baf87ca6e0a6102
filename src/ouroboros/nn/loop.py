"""Shipped loop parts: what enters at loop boundaries. Shapes: D model width, L table rows, ``...`` the leading axes.

Where a part has neutral values (embedding, injection, gain, contractive step) it starts at them, and then computes bit
for bit what its absence computes. What is handed from loop to loop is in :mod:`ouroboros.nn.flow`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ouroboros.config.parts import loop as specs
from ouroboros.nn.norm import rms_norm
from ouroboros.nn.part import Init, LoopModule, Projection, Started, ZeroProjection


class _Table(LoopModule):
    """A row of ``width`` numbers for every loop; later loops use the last."""

    PARAMETER_ROLES = {"weight": "vector"}

    def __init__(self, spec: specs.TablePart, width: int, loops: int, norm_eps: float) -> None:
        super().__init__()
        self.eps = norm_eps
        self.weight = nn.Parameter(torch.empty(spec.rows or loops, width))
        self.reset_parameters()

    def row(self, loop: int) -> Tensor:
        """The row of ``loop``, (D,)."""
        return self.weight[min(loop, len(self.weight) - 1)]


class LoopEmbedding(_Table):
    """Adds a vector to the state that enters a loop; zero at the start."""

    def reset_parameters(self, init: Init | None = None) -> None:
        """Zero."""
        nn.init.zeros_(self.weight)

    def enter(self, x: Tensor, carried: dict[str, Tensor], loop: int) -> Tensor:
        """``x + e_loop``."""
        return x + self.row(loop).to(x.dtype)


class LoopNorm(_Table):
    """RMS norm of the state that a loop has produced, with a gain for each loop (Controller, section 2.5)."""

    def __init__(self, spec: specs.LoopNormSpec, width: int, loops: int, norm_eps: float) -> None:
        super().__init__(spec, width, loops, norm_eps if spec.eps is None else spec.eps)

    def reset_parameters(self, init: Init | None = None) -> None:
        """One."""
        nn.init.ones_(self.weight)

    def leave(self, x: Tensor, z: Tensor, carried: dict[str, Tensor], loop: int) -> Tensor:
        """``norm(z) * g_loop``, computed in float32."""
        return rms_norm(z.float(), self.row(loop).float(), self.eps, once=self.training).to(z.dtype)

    def scales(self, x: Tensor, z: Tensor, carried: dict[str, Tensor], loop: int) -> dict[str, Tensor]:
        """The gain behind the norm."""
        return {"gain of the norm": self.row(loop)}


class Injection(LoopModule):
    """The state before the first loop enters every loop: ``x + s * x0`` or ``W [x; x0]``; neutral at the start."""

    def __init__(self, spec: specs.InjectionSpec, width: int, loops: int, norm_eps: float) -> None:
        super().__init__()
        if spec.mode == "add":
            self.scale = nn.Parameter(torch.zeros(width))
        else:
            self.proj = _Concatenated(width)

    def reset_parameters(self, init: Init | None = None) -> None:
        """Zero scales; the map inside starts by itself."""
        if hasattr(self, "scale"):
            nn.init.zeros_(self.scale)

    def enter(self, x: Tensor, carried: dict[str, Tensor], loop: int) -> Tensor:
        """The state with the first one injected."""
        if hasattr(self, "scale"):
            return x + self.scale.to(x.dtype) * carried["x0"]
        return self.proj(torch.cat((x, carried["x0"]), dim=-1)).to(x.dtype)


class _Concatenated(Started, Projection):
    """A learned map of ``[x; x0]`` to D channels; starts as the identity on ``x``."""

    def __init__(self, width: int) -> None:
        super().__init__(2 * width, width, bias=False)

    def reset_parameters(self, init: Init | None = None) -> None:
        """Identity on ``x``, zero on ``x0``."""
        nn.init.eye_(self.weight)


class RecurrenceGate(LoopModule):
    """``x <- g * z + (1 - g) * x`` with ``g = sigmoid(W [z; x] + b)``; starts at the same gate everywhere."""

    def __init__(self, spec: specs.RecurrenceGateSpec, width: int, loops: int, norm_eps: float) -> None:
        super().__init__()
        self.proj = ZeroProjection(2 * width, width, bias=spec.bias)

    def leave(self, x: Tensor, z: Tensor, carried: dict[str, Tensor], loop: int) -> Tensor:
        """Between the previous state and the new one."""
        gate = self._gate(x, z).to(z.dtype)
        return gate * z + (1 - gate) * x

    def scales(self, x: Tensor, z: Tensor, carried: dict[str, Tensor], loop: int) -> dict[str, Tensor]:
        """The gate."""
        return {"gate": self._gate(x, z)}

    def _gate(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.sigmoid(self.proj(torch.cat((z, x), dim=-1)).float())


class UpdateGate(LoopModule):
    """``x <- x + g * (z - x)`` with ``g = 2 sigmoid(W [z; x] + b)``; one at the start."""

    def __init__(self, spec: specs.UpdateGateSpec, width: int, loops: int, norm_eps: float) -> None:
        super().__init__()
        self.proj = ZeroProjection(2 * width, width, bias=0.0)

    def leave(self, x: Tensor, z: Tensor, carried: dict[str, Tensor], loop: int) -> Tensor:
        """The previous state and the scaled change."""
        return z + (2 * self._sigmoid(x, z).to(z.dtype) - 1) * (z - x)  # a gate of 1 changes no bit of z

    def scales(self, x: Tensor, z: Tensor, carried: dict[str, Tensor], loop: int) -> dict[str, Tensor]:
        """The gate."""
        return {"gate of the update": 2 * self._sigmoid(x, z)}

    def _sigmoid(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.sigmoid(self.proj(torch.cat((z, x), dim=-1)).float())


class LoopGain(LoopModule):
    """``x <- x + k_l (z - x)``, or ``x + (z - x) / sqrt(mean((z - x)^2) + eps)``; one at the start."""

    PARAMETER_ROLES = {"weight": "vector"}

    def __init__(self, spec: specs.LoopGainSpec, width: int, loops: int, norm_eps: float) -> None:
        super().__init__()
        self.eps = norm_eps
        self.weight = None
        if spec.form != "rms":
            self.weight = nn.Parameter(torch.ones(loops, width if spec.form == "channel" else 1))

    def reset_parameters(self, init: Init | None = None) -> None:
        """One."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def leave(self, x: Tensor, z: Tensor, carried: dict[str, Tensor], loop: int) -> Tensor:
        """The previous state and the scaled change."""
        if self.weight is None:
            return x + nn.functional.rms_norm(z - x, x.shape[-1:], eps=self.eps)
        # Written so that a gain of 1 changes no bit of z.
        return z + (self.weight[min(loop, len(self.weight) - 1)] - 1).to(z.dtype) * (z - x)

    def scales(self, x: Tensor, z: Tensor, carried: dict[str, Tensor], loop: int) -> dict[str, Tensor]:
        """The gain."""
        if self.weight is not None:
            return {"gain": self.weight[min(loop, len(self.weight) - 1)]}
        return {"gain": ((z - x).square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()}


class ContractiveStep(LoopModule):
    """``x <- (1 - dt) x + dt z``. Has no parameters."""

    def __init__(self, spec: specs.ContractiveStepSpec, width: int, loops: int, norm_eps: float) -> None:
        super().__init__()
        self.step = spec.step

    def leave(self, x: Tensor, z: Tensor, carried: dict[str, Tensor], loop: int) -> Tensor:
        """Part of the way from the previous state to the new one."""
        return torch.lerp(x, z, self.step) if self.step < 1 else z
