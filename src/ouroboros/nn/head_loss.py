"""The output head and its loss in one: the logits of all positions are never in memory at once.

Shapes: N positions, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ouroboros.nn.once import once_differentiable

IGNORED = -100
"""The target of a position that has no loss, as in ``torch.nn.functional.cross_entropy``."""
CHUNK_LOGITS = 2**20
"""About this many logits are computed at a time: 4 MB in float32, which a processor's cache holds."""
LEAST_ROWS = 128
"""Positions that are computed at a time at least, however large the vocabulary."""


def head_loss(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    smoothing: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of ``softcap tanh(scale x W^T / softcap)`` in nats, with smoothed targets and without.

    The gradient is computed together with the loss, a chunk of positions at a time, so the backward pass only scales
    it; it has no second derivatives. Where no target counts the loss is NaN, as torch has it.

    Args:
        x_ND: final states.
        weight_VD: of the head.
        targets_N: token ids, or :data:`IGNORED`.
        smoothing: share of the target's probability that all V tokens have alike (Szegedy et al. 2016, section 7).
        scale: of the logits.
        softcap: bound of the logits, or None.

    Returns:
        What is minimised, and the same without smoothing and without gradient.
    """
    return _HeadLoss.apply(x_ND, weight_VD, targets_N, smoothing, scale, softcap)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        smoothing: float,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        N, V = x_ND.shape[0], weight_VD.shape[0]
        counts_N = targets_N != IGNORED
        share_N = counts_N.float() / counts_N.sum()
        dx_ND, dw_DV = torch.empty_like(x_ND), weight_VD.new_zeros(weight_VD.shape[1], V)
        plain, spread = x_ND.new_zeros((), dtype=torch.float64), x_ND.new_zeros((), dtype=torch.float64)
        # Every chunk reads the matrix and adds to its gradient, so it is not worth while for few positions.
        size = max(LEAST_ROWS, CHUNK_LOGITS // V)
        for rows in (slice(start, start + size) for start in range(0, N, size)):
            share_N1, target_N1 = share_N[rows, None], targets_N[rows, None].clamp(min=0)
            z_NV = (x_ND[rows] @ weight_VD.mT).float()
            slope_NV: Tensor | None = None
            if scale != 1.0:
                z_NV.mul_(scale)
            if softcap is not None:
                bent_NV = torch.tanh_(z_NV.div_(softcap))
                slope_NV, z_NV = 1 - bent_NV.square(), bent_NV.mul_(softcap)
            log_p_NV = torch.log_softmax(z_NV, dim=-1)
            plain -= (log_p_NV.gather(1, target_N1) * share_N1).sum().double()
            if smoothing:
                spread -= (log_p_NV.mean(dim=1, keepdim=True) * share_N1).sum().double()
            dz_NV = log_p_NV.exp_()
            if smoothing:
                dz_NV.sub_(smoothing / V)
            dz_NV.scatter_add_(1, target_N1, torch.full_like(share_N1, smoothing - 1.0))
            if slope_NV is not None:
                dz_NV.mul_(slope_NV)
            # A position's share multiplies D numbers here, and not V before.
            dx_ND[rows] = (dz_NV @ weight_VD).mul_(share_N1 * scale)
            dw_DV += (x_ND[rows] * (share_N1 * scale)).mT @ dz_NV
        ctx.save_for_backward(dx_ND, dw_DV)
        plain_loss = plain.float()
        ctx.mark_non_differentiable(plain_loss)
        return ((1 - smoothing) * plain + smoothing * spread).float(), plain_loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dx_ND, dw_DV = ctx.saved_tensors
        return dx_ND * gradients[0], (dw_DV * gradients[0]).mT, None, None, None, None
