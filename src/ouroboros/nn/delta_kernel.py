"""The delta residual's passes over the state, with backward passes in closed form.

A state is large beside what else a residual touches, and what costs time is to read, write and allocate tensors of its
size. Autograd's own backward passes do that more often.

Shapes: V value channels, D model width, ``...`` the leading axes; B batch, T positions, K taps, S = T + K - 1, U
channels in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def wide(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


def inverse_length(h_D: Tensor, guard: str, eps: float) -> Tensor:
    """``1 / sqrt(|h|^2 + eps^2)``, or ``1 / max(|h|, eps)`` with the guard ``clamped``; (..., D) to (..., 1)."""
    if guard == "additive":
        return torch.rsqrt(h_D.square().sum(-1, keepdim=True) + eps**2)
    return _length(h_D).clamp(min=eps).reciprocal()


def _length(h_D: Tensor) -> Tensor:
    """``|h|`` (..., 1). Unlike a root's, its gradient at 0 is 0: infinity times 0 would reach the weights as NaN."""
    return torch.linalg.vector_norm(h_D, dim=-1, keepdim=True)


class DeltaUpdate(torch.autograd.Function):
    """``X' = X + b k (v - k.X)`` with ``k = s h``, ``s`` the guarded inverse length; or ``X + b k v`` without erasing.

    With ``e = v - k.X``, ``G`` the gradient of ``X'`` and ``g = k.G``: ``dX = G - b k g``, ``dv = b g``, ``db = g.e``,
    ``dk = b (G e - X g)``, ``dh = s (dk - k (k.dk))``, sums over the value channels. All of it is float32 at least,
    whatever the state's dtype, also under autocast.
    """

    @staticmethod
    def forward(
        ctx: Any, x_VD: Tensor, h_D: Tensor, beta_1: Tensor, value_V: Tensor, guard: str, eps: float, erase: bool
    ) -> Tensor:
        """The new state (..., V, D).

        Args:
            ctx: keeps what the backward pass needs.
            x_VD: the state (..., V, D).
            h_D: the sublayer's output (..., D).
            beta_1: the gate (..., 1), float32 or float64, as the value.
            value_V: the target (..., V).
            guard: see :func:`inverse_length`.
            eps: of the guard.
            erase: False writes ``b k v`` alone.
        """
        ctx.update_dtype, h_D = h_D.dtype, wide(h_D)
        scale_1 = inverse_length(h_D, guard, eps)
        k_D = h_D * scale_1
        error_V = value_V - _dot(x_VD, k_D) if erase else value_V
        # Below the clamp the length is a constant.
        free_1 = _length(h_D) >= eps if guard == "clamped" else None
        ctx.save_for_backward(x_VD, k_D, scale_1, beta_1, value_V, error_V, free_1)
        ctx.erase = erase
        return _write(x_VD, beta_1 * error_V, k_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        """Gradients of the state, the sublayer's output, the gate and the value."""
        x_VD, k_D, scale_1, beta_1, value_V, error_V, free_1 = ctx.saved_tensors
        out_VD = gradients[0]
        along_V = _dot(out_VD, k_D)
        dvalue_V = beta_1 * along_V
        dbeta_1 = (along_V * error_V).sum(-1, keepdim=True)
        # k.dk, without another pass: k.X = v - e, or nothing was erased and e = v.
        radial_1 = (dvalue_V * (2 * error_V - value_V)).sum(-1, keepdim=True)
        if free_1 is not None:
            radial_1 = radial_1 * free_1
        dh_D = _mix(scale_1 * beta_1 * error_V, out_VD)
        if ctx.erase:
            dh_D -= _mix(scale_1 * dvalue_V, x_VD)
        dh_D.addcmul_(k_D, scale_1 * radial_1, value=-1)
        dx_VD = _write(out_VD, -dvalue_V, k_D) if ctx.erase else out_VD
        return dx_VD, dh_D.to(ctx.update_dtype), dbeta_1, dvalue_V, None, None, None


def _write(x_VD: Tensor, amount_V: Tensor, k_D: Tensor) -> Tensor:
    """``X + a k``, in the dtype of ``X``."""
    return torch.addcmul(wide(x_VD), amount_V[..., None], k_D[..., None, :]).to(x_VD.dtype)


def _dot(x_VD: Tensor, k_D: Tensor) -> Tensor:
    """``k.X`` (..., V)."""
    if x_VD.shape[-2] == 1:
        return (wide(x_VD) * k_D[..., None, :]).sum(-1)
    return _product(k_D, wide(x_VD).mT)


def _mix(amount_V: Tensor, x_VD: Tensor) -> Tensor:
    """``sum_j a_j X_j`` (..., D)."""
    if x_VD.shape[-2] == 1:
        return amount_V * wide(x_VD)[..., 0, :]
    return _product(amount_V, wide(x_VD))


def _product(row: Tensor, matrix: Tensor) -> Tensor:
    """Batched small products: they read a state of several channels once and write nothing of its size."""
    with torch.autocast(row.device.type, enabled=False):
        return torch.matmul(row[..., None, :], matrix)[..., 0, :]


class CausalMix(torch.autograd.Function):
    """``y_t,v = sum_s sum_u W_s,v,u X_(t+s),u``: each feature by itself, over channels and K successive tokens.

    Computed in float32 at least, without a tensor of all products.
    """

    @staticmethod
    def forward(ctx: Any, x_BSUD: Tensor, weight_KVUD: Tensor) -> Tensor:
        """``x`` (B, T + K - 1, U, D) and weights (K, V, U, D) to (B, T, V, D), float32 at least."""
        ctx.save_for_backward(x_BSUD, weight_KVUD)
        return _mixed(wide(x_BSUD), wide(weight_KVUD))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:  # pyrefly: ignore[bad-override]
        """``dX`` is the same operation with taps in reverse and channels exchanged."""
        x_BSUD, weight_KVUD = ctx.saved_tensors
        dy_BTVD, more = gradients[0], weight_KVUD.shape[0] - 1
        padded = F.pad(dy_BTVD, (0, 0, 0, 0, more, more)) if more else dy_BTVD
        dx_BSUD = _mixed(padded, wide(weight_KVUD).flip(0).transpose(1, 2))
        products = [(dy_BTVD * term).sum((0, 1)) for _, _, term in _terms(wide(x_BSUD), weight_KVUD)]
        K, V, U, D = weight_KVUD.shape
        dweight_KVUD = torch.stack(products).view(K, U, V, D).transpose(1, 2)
        return dx_BSUD.to(x_BSUD.dtype), dweight_KVUD.to(weight_KVUD.dtype)


def _terms(x_BSUD: Tensor, weight_KVUD: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Tap, input channel and the inputs (B, T, 1, D) that it weights."""
    K, _, U, _ = weight_KVUD.shape
    T = x_BSUD.shape[1] - K + 1
    for tap in range(K):
        for channel in range(U):
            yield tap, channel, x_BSUD[:, tap : tap + T, channel : channel + 1]


def _mixed(x_BSUD: Tensor, weight_KVUD: Tensor) -> Tensor:
    """The sum of :class:`CausalMix`, one term after another into the same tensor."""
    y_BTVD: Tensor | None = None
    for tap, channel, term in _terms(x_BSUD, weight_KVUD):
        weight_VD = weight_KVUD[tap, :, channel]
        y_BTVD = term * weight_VD if y_BTVD is None else y_BTVD.addcmul_(term, weight_VD)
    assert y_BTVD is not None
    return y_BTVD
