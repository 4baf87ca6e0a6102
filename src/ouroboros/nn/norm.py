"""Normalisation. Shapes: any leading axes, D model width (or C channels per head) last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ouroboros.config import NormPart, RMSNormSpec
from ouroboros.nn.once import once_differentiable
from ouroboros.nn.part import Init, Started


class RMSNorm(Started):
    """``y = x / sqrt(mean(x^2) + eps) * weight`` over the last axis (Zhang & Sennrich 2019, eq. 4).

    Args:
        width: size of the last axis.
        eps: added to the mean square.
        gain: learn the weight; without, it is one.
        factor: is multiplied to the result.
    """

    def __init__(self, width: int, eps: float = 1e-6, *, gain: bool = True, factor: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if gain else None
        self.width, self.eps, self.factor = width, eps, factor

    def reset_parameters(self, init: Init | None = None) -> None:
        """One."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` of shape (..., width); computed in float32, returned in the input's dtype."""
        wide = x.float()
        if self.weight is None:
            weight = wide.new_full((self.width,), self.factor)
        else:
            weight = self.weight.float() if self.factor == 1 else self.weight.float() * self.factor
        return rms_norm(wide, weight, self.eps, once=self.training).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}"


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, once: bool) -> Tensor:
    """As ``torch.nn.functional.rms_norm`` over the last axis, on a CPU in a third of its time.

    torch computes it there by eight operations and their derivatives. The compiler makes one program of them, so that
    path is left alone, and so is every other device.

    Args:
        x: (..., width).
        weight: (width,).
        eps: added to the mean square.
        once: gradients are asked for once, as in training; the fast way has no second derivatives.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or (torch.is_grad_enabled() and not once):
        return F.rms_norm(x, weight.shape, weight, eps)
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return _RMSNorm.apply(x, weight, eps)
    return torch.mul(x, _inverse_rms(x, eps)).mul_(weight)  # the same numbers; the function around them costs more


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(mean(x^2) + eps)``, (..., 1)."""
    return torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)


class _RMSNorm(torch.autograd.Function):
    """With ``r = 1 / sqrt(mean(x^2) + eps)`` and ``h = r x``: ``y = h w``, ``dw = sum(dy h)`` and
    ``dx = r (dy w - h mean(dy w h))``."""

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # the inputs are float32, and the inner product would be rounded
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x, scale).mul_(weight)

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        width, dy = x.shape[-1], gradients[0].contiguous()
        # Layer norm's kernel, told that the mean is 0, gives r (dy w - h mean(dy w h) - mean(dy w)), and dw.
        zero = torch.zeros_like(scale)
        dx, dw, _ = torch.ops.aten.native_layer_norm_backward(
            dy, x.contiguous(), [width], zero, scale, weight, None, [True, True, False]
        )
        extra = torch.matmul(dy, weight).div_(width).unsqueeze(-1).mul_(scale)
        return dx.add_(extra), dw, None


class LayerNorm(Started):
    """``y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last axis (Ba et al. 2016, eq. 3).

    Args:
        width: size of the last axis.
        eps: added to the variance.
        factor: is multiplied to the result.
    """

    def __init__(self, width: int, eps: float = 1e-5, *, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def reset_parameters(self, init: Init | None = None) -> None:
        """Weight one, bias zero."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` of shape (..., width); computed in float32 or wider, returned in the input's dtype."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        y = F.layer_norm(x.to(wide), weight.shape, weight, bias, self.eps)
        return (y if self.factor == 1 else y * self.factor).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


def rms_norm_of(spec: RMSNormSpec, width: int) -> RMSNorm:
    """The RMS norm of a specification."""
    return RMSNorm(width, spec.eps, gain=spec.gain, factor=spec.factor)


def layer_norm_of(spec: NormPart, width: int) -> LayerNorm:
    """The layer norm of a specification."""
    return LayerNorm(width, spec.eps, factor=spec.factor)
