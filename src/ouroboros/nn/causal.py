"""Causal attention on CPUs in bfloat16, with a backward pass of matrix products.

torch's fused CPU kernel is fast forward, but its backward does not use the matrix units of bfloat16 processors: it
takes six times as long as the forward. Here the forward is the fused kernel and the backward recomputes probabilities
from its log-sum-exp in blocks of rows, as FlashAttention does (Dao et al. 2022, algorithm 4), with batched products.
Shapes: B batch, H heads, T positions, C channels per head, Q rows of a block.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

ROWS = 128
"""Query rows of a block, at least: few enough to skip most of the masked half, enough for the matrix units."""
MAX_BLOCKS = 8
"""Blocks are unrolled in the compiled program, so longer windows have longer blocks."""


def suits(q_BHTC: Tensor, k_BHSC: Tensor) -> bool:
    """Whether :class:`CausalAttention` is the faster way: compiled bfloat16 training on a CPU, T == S > 1 positions.

    Uncompiled, its elementwise steps cost more than the products save.
    """
    return (
        torch.compiler.is_compiling()
        and q_BHTC.device.type == "cpu"
        and q_BHTC.dtype == torch.bfloat16
        and q_BHTC.requires_grad
        and torch.is_grad_enabled()
        and q_BHTC.shape[2] == k_BHSC.shape[2] > 1
    )


class CausalAttention(torch.autograd.Function):
    """``softmax(q k^T / sqrt(C) + causal) v`` for (B, H, T, C) tensors."""

    @staticmethod
    def forward(ctx: Any, q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor) -> Tensor:
        """The fused kernel; keeps its log-sum-exp (B, T, H)."""
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        y_BHTC, lse_BHT = fused(q_BHTC, k_BHTC, v_BHTC, 0.0, True)
        ctx.save_for_backward(q_BHTC, k_BHTC, v_BHTC, y_BHTC, lse_BHT)
        return y_BHTC

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With ``p = exp(s - lse)``: ``dv = p^T dy; ds = p (dy v^T - rowsum(dy y)); dq = ds k; dk = ds^T q``."""
        q, k, v, y, lse = ctx.saved_tensors
        dy = gradients[0]
        T, scale = q.shape[2], 1 / math.sqrt(q.shape[3])
        delta = (dy.float() * y.float()).sum(-1, keepdim=True)
        dq, dk, dv = [], torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        size = max(ROWS, -(-T // MAX_BLOCKS))
        for start in range(0, T, size):
            end = min(start + size, T)
            rows = slice(start, end)
            scores = torch.matmul(q[:, :, rows], k[:, :, :end].mT).float() * scale
            visible = torch.ones(end - start, end, dtype=torch.bool, device=q.device).tril(start)
            p = torch.where(visible, torch.exp(scores - lse[:, :, rows, None]), 0.0)
            dp = torch.matmul(dy[:, :, rows], v[:, :, :end].mT).float()
            ds = (p * (dp - delta[:, :, rows]) * scale).to(q.dtype)
            dq.append(torch.matmul(ds, k[:, :, :end]))
            dk[:, :, :end] += torch.matmul(ds.mT, q[:, :, rows])
            dv[:, :, :end] += torch.matmul(p.to(v.dtype).mT, dy[:, :, rows])
        return torch.cat(dq, dim=2), dk.to(k.dtype), dv.to(v.dtype)
