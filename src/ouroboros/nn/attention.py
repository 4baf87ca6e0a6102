"""Grouped-query causal self-attention.

Shapes: B batch, T query length, S key length, R registers, D model width, H query heads, K key/value heads,
C channels per head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ouroboros.config.parts.attention import AttentionSpec
from ouroboros.nn import causal
from ouroboros.nn.norm import RMSNorm
from ouroboros.nn.part import Init, Projection, Started
from ouroboros.nn.rope import rotate
from ouroboros.nn.shift import TokenShift
from ouroboros.nn.small import ZeroLinear
from ouroboros.nn.visit import VisitContext

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "elu+1": lambda x: F.elu(x) + 1,
}
"""Functions of queries, keys and values by name; ``none`` is absent."""


class Attention(Started):
    """``softmax(q k^T / sqrt(C) + mask) v``, K key/value heads shared by H query heads (Ainslie et al. 2023).

    Optional: another number than C under the root; biases, RMS norm of queries and keys before or after rotation, a
    learned gain per query head; activations of queries, keys and values; keys and values mixed with the previous
    token's; norm and gate of what heads return.
    """

    def __init__(self, spec: AttentionSpec, hidden_size: int, norm_eps: float) -> None:
        super().__init__()
        self.spec = spec
        self.head_dim = spec.head_width(hidden_size)
        queries, keys = spec.num_heads * self.head_dim, spec.kv_heads * self.head_dim
        self.q_proj = Projection(hidden_size, queries, bias=spec.qkv_bias)
        self.k_proj = Projection(hidden_size, keys, bias=spec.qkv_bias)
        self.v_proj = Projection(hidden_size, keys, bias=spec.qkv_bias)
        self.o_proj = Projection(queries, hidden_size, bias=spec.out_bias)
        if spec.qk_norm != "none":
            self.q_norm = RMSNorm(self.head_dim, norm_eps, gain=spec.qk_norm_gain)
            self.k_norm = RMSNorm(self.head_dim, norm_eps, gain=spec.qk_norm_gain)
        if spec.query_gain is not None:
            self.query_gain = nn.Parameter(torch.full((spec.num_heads,), spec.query_gain))
        if spec.k_shift:
            self.k_shift = TokenShift(hidden_size, spec.kv_heads)
        if spec.v_shift:
            self.v_shift = TokenShift(hidden_size, spec.kv_heads)
        if spec.normalises_heads:
            self.head_norm = RMSNorm(self.head_dim, norm_eps)
        if spec.output_gate:
            self.gate_proj = Projection(hidden_size, queries, bias=False)
        if spec.head_gate:
            self.head_gate = ZeroLinear(hidden_size, spec.num_heads)
        if spec.value_embedding:
            self.value_scale = nn.Parameter(torch.ones(1))
        if spec.value_residual is not None:
            self.value_mix = nn.Parameter(torch.empty(2))
        self.reset_parameters()

    def reset_parameters(self, init: Init | None = None) -> None:
        """The gain of queries and the factors of values at their start."""
        spec = self.spec
        if spec.query_gain is not None:
            nn.init.constant_(self.query_gain, spec.query_gain)
        if spec.value_embedding:
            nn.init.ones_(self.value_scale)
        if spec.value_residual is not None:
            nn.init.constant_(self.value_mix[0], 1 - spec.value_residual)
            nn.init.constant_(self.value_mix[1], spec.value_residual)

    def forward(self, x_BTD: Tensor, visit: VisitContext) -> Tensor:
        """Mix (B, T, D) over time.

        Args:
            x_BTD: the normalised stream.
            visit: rotary tables, mask, and past keys and values, which the call extends.
        """
        B, T, _ = x_BTD.shape
        spec, memory = self.spec, visit.memory
        q_BTHC = self.project("q_proj", x_BTD, visit).view(B, T, -1, self.head_dim)
        k_BTKC = self.project("k_proj", x_BTD, visit).view(B, T, -1, self.head_dim)
        v_BTKC = self._values(x_BTD, visit).view(B, T, -1, self.head_dim)
        if spec.k_shift:
            k_BTKC = self.k_shift(k_BTKC, x_BTD, memory, visit.padding, "k_shift")
        if spec.v_shift:
            v_BTKC = self.v_shift(v_BTKC, x_BTD, memory, visit.padding, "v_shift")
        q_BHTC = _activate(q_BTHC, spec.q_activation).transpose(1, 2)
        k_BKTC = _activate(k_BTKC, spec.k_activation).transpose(1, 2)
        v_BKTC = _activate(v_BTKC, spec.v_activation).transpose(1, 2)
        q_BHTC, k_BKTC = self._position(q_BHTC, k_BKTC, visit.rotary)
        if spec.score_channels is not None:  # the kernels divide by the root of C
            q_BHTC = q_BHTC * (self.head_dim / spec.score_channels) ** 0.5
        if spec.query_gain is not None:
            q_BHTC = q_BHTC * self.query_gain.to(q_BHTC.dtype)[:, None, None]
        y_BTHC = self._attended(q_BHTC, k_BKTC, v_BKTC, visit).transpose(1, 2)
        if spec.normalises_heads:
            y_BTHC = self.head_norm(y_BTHC)
        if spec.output_gate:
            y_BTHC = y_BTHC * F.silu(self.gate_proj(x_BTD)).view(y_BTHC.shape)
        if spec.head_gate:
            y_BTHC = y_BTHC * (2 * torch.sigmoid(self.head_gate(x_BTD)))[..., None]
        return self.project("o_proj", y_BTHC.reshape(B, T, -1), visit)

    def project(self, name: str, x: Tensor, visit: VisitContext) -> Tensor:
        """What the linear map ``name`` of queries, keys, values or outputs makes of ``x``."""
        return getattr(self, name)(x)

    def _attended(self, q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, visit: VisitContext) -> Tensor:
        """What all heads return, (B, H, T, C)."""
        keys, values = (k_BKTC, v_BKTC) if visit.memory is None else visit.memory.extend(k_BKTC, v_BKTC)
        dropout = self.spec.dropout if self.training else 0.0
        if visit.attend is None:
            y_BHTC = attend(q_BHTC, keys, values, visit.mask, dropout, once=self.training)
        else:
            y_BHTC = visit.attend(q_BHTC, keys, values, visit.mask, dropout)
        return exclude(y_BHTC, v_BKTC) if self.spec.exclusive else y_BHTC

    def _values(self, x_BTD: Tensor, visit: VisitContext) -> Tensor:
        """Values of all heads, (B, T, K C), with what the stem and the first block add to them."""
        v_BTE = self.project("v_proj", x_BTD, visit)
        spec, carried = self.spec, visit.carried
        if spec.value_embedding and carried is not None and "values" in carried:  # registers have no embedding
            v_BTE = v_BTE + self.value_scale.to(v_BTE.dtype) * carried["values"].to(v_BTE.dtype)
        if spec.value_residual is not None and carried is not None:
            if visit.first:
                carried["first_values"] = v_BTE
            own, first = self.value_mix.to(v_BTE.dtype)
            v_BTE = own * v_BTE + first * carried["first_values"]
        return v_BTE

    def _position(self, q: Tensor, k: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Rotation and query/key norm, in the order the specification names."""
        if self.spec.qk_norm == "before_rope":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if self.spec.qk_norm == "after_rope":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k


def _activate(x: Tensor, name: str) -> Tensor:
    return x if name == "none" else ACTIVATIONS[name](x)


def exclude(y_BHTC: Tensor, v_BKTC: Tensor) -> Tensor:
    """What heads return without its component along the token's own value, of the key/value head that serves each."""
    direction_BK1TC = F.normalize(v_BKTC, dim=-1, eps=1e-12)[:, :, None]
    y_BKGTC = y_BHTC.unflatten(1, (v_BKTC.shape[1], -1))
    along = (y_BKGTC * direction_BK1TC).sum(-1, keepdim=True)
    return (y_BKGTC - along * direction_BK1TC).flatten(1, 2)


def attend(
    q_BHTC: Tensor,
    k_BKSC: Tensor,
    v_BKSC: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    *,
    scale: float | None = None,
    once: bool = False,
) -> Tensor:
    """Scaled dot-product attention; ``mask`` None means causal over T == S; ``scale`` None means ``1 / sqrt(C)``.

    ``once`` says that gradients are asked for once, as in training, which allows ways that have no second derivatives.
    A single query per sequence folds each group of query heads into the query axis, so that shared keys and values
    are read once instead of being repeated.
    """
    H, K, T = q_BHTC.shape[1], k_BKSC.shape[1], q_BHTC.shape[2]
    if T == 1 and H != K:
        packed = q_BHTC.view(q_BHTC.shape[0], K, H // K, -1)
        y = F.scaled_dot_product_attention(packed, k_BKSC, v_BKSC, mask, dropout, scale=scale)
        return y.view(*q_BHTC.shape[:-1], v_BKSC.shape[-1])
    if H != K:
        k_BKSC, v_BKSC = (t.repeat_interleave(H // K, dim=1) for t in (k_BKSC, v_BKSC))
    if mask is None and dropout == 0 and scale is None and causal.suits(q_BHTC, k_BKSC):
        return causal.CausalAttention.apply(q_BHTC, k_BKSC, v_BKSC)
    if once and mask is None and dropout == 0 and scale is None and causal.suits_kept(q_BHTC, k_BKSC):
        return causal.KeptAttention.apply(q_BHTC, k_BKSC, v_BKSC)
    return F.scaled_dot_product_attention(
        q_BHTC, k_BKSC, v_BKSC, mask, dropout, is_causal=mask is None and T > 1, scale=scale
    )
