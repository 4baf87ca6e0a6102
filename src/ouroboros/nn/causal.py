"""Causal attention on CPUs with a backward pass of matrix products, in training.

torch's fused CPU kernel is fast forward, but not backward: it does not use the matrix units of bfloat16 processors (six
times the forward's time), and in float32 it takes half as long again as batched products. :class:`CausalAttention` is
for compiled bfloat16: the forward is the fused kernel, the backward recomputes probabilities from its log-sum-exp in
blocks of rows, as FlashAttention does (Dao et al. 2022, algorithm 4). :class:`KeptAttention` is for float32 and short
windows: it keeps the probabilities.
Shapes: B batch, H heads, N = B H, T positions, C channels per head, Q rows of a block, K keys they see.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ouroboros.nn.once import once_differentiable

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


KEPT_ROWS = 64
"""Query rows of a block of :class:`KeptAttention`, at least."""
KEPT_POSITIONS = 512
"""The longest window whose probabilities are kept; they take ``2 T^2 + T`` numbers per head."""


def suits_kept(q_BHTC: Tensor, k_BHSC: Tensor) -> bool:
    """Whether :class:`KeptAttention` is the faster way: float32 on a CPU with gradients, T == S positions, not many.

    In a compiled program too: it calls the same products.
    """
    return (
        q_BHTC.device.type == "cpu"
        and q_BHTC.dtype == torch.float32
        and q_BHTC.requires_grad
        and torch.is_grad_enabled()
        and 1 < q_BHTC.shape[2] == k_BHSC.shape[2] <= KEPT_POSITIONS
    )


class KeptAttention(torch.autograd.Function):
    """``softmax(q k^T / sqrt(C) + causal) v`` for (B, H, T, C) tensors; keeps the probabilities."""

    @staticmethod
    def forward(ctx: Any, q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor) -> Tensor:
        """Blocks of rows against the keys that they see."""
        B, H, T, _ = q_BHTC.shape
        q, k, v = (t.reshape(B * H, T, -1) for t in (q_BHTC, k_BHTC, v_BHTC))
        scale = 1 / math.sqrt(q.shape[-1])
        y_NTC, kept = torch.empty_like(v), []
        for start, end in _blocks(T):
            hidden_QK = torch.full((end - start, end), -math.inf, device=q.device).triu(start + 1)
            p_NQK = torch.softmax(torch.baddbmm(hidden_QK, q[:, start:end], k[:, :end].mT, alpha=scale), dim=-1)
            y_NTC[:, start:end] = torch.bmm(p_NQK, v[:, :end])
            kept.append(p_NQK)
        ctx.save_for_backward(q, k, v, *kept)
        return y_NTC.view(B, H, T, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``dv = p^T dy; dp = dy v^T; ds = p (dp - rowsum(dp p)); dq = ds k; dk = ds^T q``, scaled."""
        q, k, v, *kept = ctx.saved_tensors
        B, H, T, _ = gradients[0].shape
        dy, scale = gradients[0].reshape(B * H, T, -1), 1 / math.sqrt(q.shape[-1])
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (start, end), p_NQK in zip(_blocks(T), kept, strict=True):
            rows = slice(start, end)
            dv[:, :end] += torch.bmm(p_NQK.mT, dy[:, rows])
            dp_NQK = torch.bmm(dy[:, rows], v[:, :end].mT)
            ds_NQK = torch.ops.aten._softmax_backward_data(dp_NQK, p_NQK, -1, p_NQK.dtype)
            dq[:, rows] = torch.bmm(ds_NQK, k[:, :end])
            dk[:, :end] += torch.bmm(ds_NQK.mT, q[:, rows])
        shape = (B, H, T, -1)
        return dq.mul_(scale).view(shape), dk.mul_(scale).view(shape), dv.view(shape)


def _blocks(T: int) -> list[tuple[int, int]]:
    """First row and end of each block."""
    size = max(KEPT_ROWS, -(-T // MAX_BLOCKS))
    return [(start, min(start + size, T)) for start in range(0, T, size)]
