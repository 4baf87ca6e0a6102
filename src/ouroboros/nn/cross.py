"""Attention from one stream to another.

Shapes: B batch, T positions, D model width, H query heads, K key/value heads, C channels per head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ouroboros.config.parts.helix import CrossSpec, SplitAttentionSpec
from ouroboros.nn.attention import Attention, attend, exclude
from ouroboros.nn.part import Projection, Started, ZeroProjection
from ouroboros.nn.visit import VisitContext


class CrossAttention(Started):
    """``O softmax(Q x (K o)^T / sqrt(C) + causal) V o``: the stream ``x`` asks, the other stream ``o`` answers."""

    def __init__(self, spec: CrossSpec, width: int, norm_eps: float) -> None:
        super().__init__()
        self.q_proj = Projection(width, spec.width, bias=False)
        self.k_proj = Projection(width, spec.width, bias=False)
        self.v_proj = Projection(width, spec.width, bias=False)
        self.o_proj = ZeroProjection(spec.width, width)

    def forward(self, x_BTD: Tensor, visit: VisitContext) -> Tensor:
        """What ``x`` finds in the other stream, (B, T, D)."""
        assert visit.other is not None
        q, k, v = self.q_proj(x_BTD)[:, None], self.k_proj(visit.other)[:, None], self.v_proj(visit.other)[:, None]
        if visit.memory is not None:
            k, v = visit.memory.extend(k, v)
        return self.o_proj(attend(q, k, v, visit.mask, once=self.training)[:, 0])


class SplitAttention(Attention):
    """Attention whose last heads look at the other stream, see its specification."""

    def _attended(self, q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, visit: VisitContext) -> Tensor:
        """What all heads return, (B, H, T, C)."""
        spec, other = self.spec, visit.other
        assert isinstance(spec, SplitAttentionSpec) and other is not None
        own, kv = spec.num_heads - spec.cross_heads, spec.own_kv_heads
        shape = (*other.shape[:2], -1, self.head_dim)
        other_k = self.k_proj(other).view(shape).transpose(1, 2)
        other_v = self.v_proj(other).view(shape).transpose(1, 2)
        if spec.qk_norm != "none":
            other_k = self.k_norm(other_k)
        keys = torch.cat((k_BKTC[:, :kv], other_k[:, kv:]), dim=1)
        values = torch.cat((v_BKTC[:, :kv], other_v[:, kv:]), dim=1)
        if visit.memory is not None:
            keys, values = visit.memory.extend(keys, values)
        dropout = spec.dropout if self.training else 0.0
        heads = [(slice(own), slice(kv)), (slice(own, None), slice(kv, None))]
        found = [
            attend(q_BHTC[:, q], keys[:, k], values[:, k], visit.mask, dropout, once=self.training)
            for q, k in heads[0 if own else 1 :]
        ]
        y_BHTC = torch.cat(found, dim=1)
        return exclude(y_BHTC, v_BKTC) if spec.exclusive else y_BHTC
