"""Attention through low-rank latents: with decoupled rotary keys (DeepSeek-V2), and R-HRM's published form.

A cache entry holds what ``Memory.extend`` is given: for latents one tensor in the place of the keys, and values of no
width.

Shapes: B batch, T query length, S key length, D model width, H heads, C content channels per head, N rotary channels
per head, L latent width (the papers' r), M query latent width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ouroboros.config.parts.latent import BottleneckAttentionSpec, LatentAttentionSpec
from ouroboros.nn.attention import attend
from ouroboros.nn.norm import RMSNorm
from ouroboros.nn.part import Projection
from ouroboros.nn.rope import rotate
from ouroboros.nn.visit import VisitContext

FEW = 4
"""Latents are attended to directly when the keys are at least this many times as many as the new tokens."""


class LatentAttention(nn.Module):
    """Multi-head latent attention with decoupled rotary keys (DeepSeek-V2, equations 9 to 19).

    ``c = norm(W_DKV x)`` and one rotary key ``k^R = RoPE(W_KR x)`` for all heads are all that a cache keeps::

        score_i = (q^C_i . W_UK,i c + q^R_i . k^R) / sqrt(C + N),    o_i = W_UV,i sum_j softmax(score_i)_j c_j

    Many new tokens build keys and values from the latents. For few new tokens before many latents the up-projections
    are absorbed instead (``q^C_i W_UK,i`` meets ``c`` itself, ``W_UV,i`` follows the sum), which is the same numbers in
    another order and builds no key. Weight names are those of DeepSeek-V2 in transformers.
    """

    def __init__(self, spec: LatentAttentionSpec, hidden_size: int, norm_eps: float) -> None:
        super().__init__()
        self.spec = spec
        self.head_dim, self.rotary = spec.head_width(hidden_size), spec.rotary_width(hidden_size)
        self.rank, query_rank = spec.rank(hidden_size), spec.latent_of_queries(hidden_size)
        queries = spec.num_heads * (self.head_dim + self.rotary)
        if query_rank:
            self.q_a_proj = Projection(hidden_size, query_rank, bias=False)
            self.q_a_layernorm = RMSNorm(query_rank, norm_eps)
            self.q_b_proj = Projection(query_rank, queries, bias=False)
        else:
            self.q_proj = Projection(hidden_size, queries, bias=False)
        self.kv_a_proj_with_mqa = Projection(hidden_size, self.rank + self.rotary, bias=False)
        self.kv_a_layernorm = RMSNorm(self.rank, norm_eps)
        self.kv_b_proj = Projection(self.rank, spec.num_heads * 2 * self.head_dim, bias=False)
        self.o_proj = Projection(spec.num_heads * self.head_dim, hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, visit: VisitContext) -> Tensor:
        """Mix (B, T, D) over time; arguments as in :meth:`ouroboros.nn.attention.Attention.forward`."""
        B, T, _ = x_BTD.shape
        memory = visit.memory
        q_content, q_rotary = self._queries(x_BTD)
        q_rotary = rotate(q_rotary, *visit.rotary)
        latent_BTL, k_rotary = self.kv_a_proj_with_mqa(x_BTD).split((self.rank, self.rotary), dim=-1)
        k_rotary = rotate(k_rotary[:, None], *visit.rotary)
        kept = torch.cat((self.kv_a_layernorm(latent_BTL)[:, None], k_rotary), dim=-1)
        if memory is not None:
            kept, _ = memory.extend(kept, kept[..., :0])
        absorb = memory is not None and kept.shape[2] >= T * FEW
        mix = self._absorbed if absorb else self._expanded
        y_BHTC = mix(q_content, q_rotary, kept, visit.mask)
        return self.o_proj(y_BHTC.transpose(1, 2).reshape(B, T, -1))

    def _queries(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Content (B, H, T, C) and rotary (B, H, T, N) parts of the queries."""
        B, T, _ = x_BTD.shape
        if hasattr(self, "q_proj"):
            q = self.q_proj(x_BTD)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        q = q.view(B, T, self.spec.num_heads, -1).transpose(1, 2)
        q_content, q_rotary = q.split((self.head_dim, self.rotary), dim=-1)
        return q_content, q_rotary

    def _expanded(self, q_content: Tensor, q_rotary: Tensor, kept: Tensor, mask: Tensor | None) -> Tensor:
        """Keys and values are built for every position; (B, H, T, C)."""
        B, _, S, _ = kept.shape
        H, C = self.spec.num_heads, self.head_dim
        latent, k_rotary = kept.split((self.rank, self.rotary), dim=-1)
        built = self.kv_b_proj(latent[:, 0]).view(B, S, H, 2 * C).transpose(1, 2)
        k_content, v_BHSC = built.split((C, C), dim=-1)
        k = torch.cat((k_content, k_rotary.expand(B, H, S, self.rotary)), dim=-1)
        q = torch.cat((q_content, q_rotary), dim=-1)
        # The fused kernels want values as wide as keys.
        wide = F.pad(v_BHSC, (0, self.rotary))
        return attend(q, k, wide, mask, self._dropout)[..., :C]

    def _absorbed(self, q_content: Tensor, q_rotary: Tensor, kept: Tensor, mask: Tensor | None) -> Tensor:
        """The latents are keys and values of one head that all query heads share; (B, H, T, C)."""
        H, C = self.spec.num_heads, self.head_dim
        up_k, up_v = self.kv_b_proj.weight.to(q_content.dtype).view(H, 2 * C, self.rank).split((C, C), dim=1)
        q = torch.cat((q_content @ up_k, q_rotary), dim=-1)
        scale = (C + self.rotary) ** -0.5
        z_BHTL = attend(q, kept, kept[..., : self.rank], mask, self._dropout, scale=scale)
        return z_BHTL @ up_v.mT

    @property
    def _dropout(self) -> float:
        return self.spec.dropout if self.training else 0.0


class BottleneckAttention(nn.Module):
    """Attention whose queries, keys and values come from latents, normalised per head and rotated after them (R-HRM).

    ``q = RoPE(norm(W_UQ W_DQ x))``, ``k = RoPE(norm(W_UK c))``, ``v = W_UV c`` with ``c = W_DKV x``. Norm and rotation
    stand between ``c`` and the scores, so only ``W_UV`` can be absorbed: a cache of latents rebuilds its keys at every
    step (``spec.cache``), a cache of keys and values does not.
    """

    def __init__(self, spec: BottleneckAttentionSpec, hidden_size: int, norm_eps: float) -> None:
        super().__init__()
        self.spec = spec
        self.head_dim, rank = spec.head_width(hidden_size), spec.rank(hidden_size)
        width = spec.num_heads * self.head_dim
        self.q_a_proj = Projection(hidden_size, rank, bias=False)
        self.q_b_proj = Projection(rank, width, bias=False)
        self.kv_a_proj = Projection(hidden_size, rank, bias=False)
        self.k_b_proj = Projection(rank, width, bias=False)
        self.v_b_proj = Projection(rank, width, bias=False)
        self.o_proj = Projection(width, hidden_size, bias=False)
        if spec.qk_norm != "none":
            self.q_norm = RMSNorm(self.head_dim, norm_eps)
            self.k_norm = RMSNorm(self.head_dim, norm_eps)

    def forward(self, x_BTD: Tensor, visit: VisitContext) -> Tensor:
        """Mix (B, T, D) over time; arguments as in :meth:`ouroboros.nn.attention.Attention.forward`."""
        B, T, _ = x_BTD.shape
        memory = visit.memory
        q_BHTC = self._heads(self.q_b_proj(self.q_a_proj(x_BTD)))
        q_BHTC = rotate(self.q_norm(q_BHTC) if self.spec.qk_norm != "none" else q_BHTC, *visit.rotary)
        latent_BTL = self.kv_a_proj(x_BTD)
        dropout = self.spec.dropout if self.training else 0.0
        if memory is None or self.spec.cache == "keys_values":
            k_BHSC, v_BHSC = self._keys(latent_BTL, visit.rotary), self._heads(self.v_b_proj(latent_BTL))
            if memory is not None:
                k_BHSC, v_BHSC = memory.extend(k_BHSC, v_BHSC)
            y_BHTC = attend(q_BHTC, k_BHSC, v_BHSC, visit.mask, dropout)
        else:
            kept, _ = memory.extend(latent_BTL[:, None], latent_BTL[:, None, :, :0])
            k_BHSC = self._keys(kept[:, 0], visit.key_rotary or visit.rotary)
            y_BHTC = self._over_latents(q_BHTC, k_BHSC, kept, visit.mask, dropout)
        return self.o_proj(y_BHTC.transpose(1, 2).reshape(B, T, -1))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, H * C) to (B, H, T, C)."""
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

    def _keys(self, latent_BSL: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        k_BHSC = self._heads(self.k_b_proj(latent_BSL))
        return rotate(self.k_norm(k_BHSC) if self.spec.qk_norm != "none" else k_BHSC, *rotary)

    def _over_latents(
        self, q_BHTC: Tensor, k_BHSC: Tensor, kept: Tensor, mask: Tensor | None, dropout: float
    ) -> Tensor:
        """Sum latents, then ``W_UV``, for few new tokens; build values for many. (B, H, T, C)."""
        H, T, S = q_BHTC.shape[1], q_BHTC.shape[2], k_BHSC.shape[2]
        if T * FEW > S:
            return attend(q_BHTC, k_BHSC, self._heads(self.v_b_proj(kept[:, 0])), mask, dropout)
        z_BHTL = attend(q_BHTC, k_BHSC, kept.expand(-1, H, -1, -1), mask, dropout)
        return z_BHTL @ self.v_b_proj.weight.to(z_BHTL.dtype).view(H, self.head_dim, -1).mT
