"""Attention from one stream to another against a naive softmax, one query at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ouroboros.config import RopeSpec
from ouroboros.config.part import build as build_part
from ouroboros.config.parts.helix import CrossSpec, SplitAttentionSpec
from ouroboros.nn.memory import Recorder
from ouroboros.nn.rope import Rope, rotate
from ouroboros.nn.visit import VisitContext

D, T = 24, 5
SPLITS: list[dict[str, Any]] = [
    {"num_heads": 4, "num_kv_heads": 2, "cross_heads": 2},
    {"num_heads": 4, "num_kv_heads": 4, "cross_heads": 1},
    {"num_heads": 4, "num_kv_heads": 2, "cross_heads": 4},
    {"num_heads": 6, "num_kv_heads": 3, "cross_heads": 2, "exclusive": True, "qk_norm": "before_rope"},
    {"num_heads": 4, "num_kv_heads": 2, "cross_heads": 2, "exclusive": True, "value_embedding": True},
    {"num_heads": 4, "num_kv_heads": 2, "cross_heads": 4, "exclusive": True, "value_embedding": True},
]
"""The last two: values of the own stream have an embedding, others have none, and XSA looks at the own."""


class Growing(Recorder):
    """Keeps the keys and values of all calls."""

    def extend(self, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is not None and self.values is not None:
            k_BKTC, v_BKTC = torch.cat((self.keys, k_BKTC), dim=2), torch.cat((self.values, v_BKTC), dim=2)
        return super().extend(k_BKTC, v_BKTC)


def build(spec: Any) -> Any:
    """The mixer with all weights random, also those that start at zero."""
    layer = build_part(spec, D, 1e-6).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return layer


def given(layer: Any, other: Tensor, values: Tensor, at: slice = slice(T), memory: Any = None) -> VisitContext:
    """What a visit of the positions ``at`` is given."""
    rotary: Any = None
    if isinstance(layer.spec if hasattr(layer, "spec") else None, SplitAttentionSpec):
        rotary = Rope(layer.spec.rope, layer.head_dim)(torch.arange(T)[None, at])
    new = len(range(T)[at])
    mask = torch.ones(T, T).tril().bool()[None, None, at, : at.stop] if new < T else None
    return VisitContext(rotary, mask, memory=memory, other=other[:, at], carried={"values": values[:, at]})


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of one head."""
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~torch.ones(T, T).tril().bool(), -math.inf)
    return scores.softmax(-1) @ v


def naive_split(layer: Any, x: Tensor, other: Tensor, extra: Tensor) -> Tensor:
    """Head by head: spec of the published split heads."""
    spec, C, found = layer.spec, layer.head_dim, []
    own, H, K = spec.num_heads - spec.cross_heads, spec.num_heads, spec.kv_heads
    shared = max(1, own * K // H) if own else 0
    rotary = Rope(spec.rope, C)(torch.arange(T)[None])

    def turned(t: Tensor) -> Tensor:
        return rotate(t[:, None], *rotary)[:, 0]

    def head(t: Tensor, number: int) -> Tensor:
        return t[..., number * C : (number + 1) * C]

    def normed(t: Tensor) -> Tensor:
        return t / torch.sqrt(t.square().mean(-1, keepdim=True) + 1e-6)

    for h in range(H):
        q, own_kv = head(layer.q_proj(x), h), h * K // H
        cross = h >= own
        kv = shared + (h - own) * (K - shared) // spec.cross_heads if cross else h * shared // own
        source = other if cross else x
        k, v = head(layer.k_proj(source), kv), head(layer.v_proj(source), kv)
        value = head(layer.v_proj(x), own_kv)
        if spec.value_embedding:
            value = value + layer.value_scale * head(extra, own_kv)
            v = v if cross else v + layer.value_scale * head(extra, kv)
        if spec.qk_norm == "before_rope":
            q, k = normed(q) * layer.q_norm.weight, normed(k) * layer.k_norm.weight
        y = softmax(turned(q), k if cross else turned(k), v)
        if spec.exclusive:
            direction = value / value.norm(dim=-1, keepdim=True)
            y = y - (y * direction).sum(-1, keepdim=True) * direction
        found.append(y)
    return layer.o_proj(torch.cat(found, dim=-1))


def split(changes: dict[str, Any]) -> Any:
    return build(SplitAttentionSpec(rope=RopeSpec(base=100.0), **changes))


@pytest.mark.parametrize("changes", SPLITS, ids=str)
def test_split_heads(changes: dict[str, Any]) -> None:
    layer, x, other = split(changes), torch.randn(2, T, D), torch.randn(2, T, D)
    extra = torch.randn(2, T, layer.spec.kv_heads * layer.head_dim)
    expected = naive_split(layer, x, other, extra)
    torch.testing.assert_close(layer(x, given(layer, other, extra)), expected, rtol=1e-4, atol=1e-5)


def test_cross_attention() -> None:
    layer, x, other = build(CrossSpec(width=7)), torch.randn(2, T, D), torch.randn(2, T, D)
    q, k, v = x @ layer.q_proj.weight.T, other @ layer.k_proj.weight.T, other @ layer.v_proj.weight.T
    expected = softmax(q, k, v) @ layer.o_proj.weight.T
    torch.testing.assert_close(layer(x, given(layer, other, x)), expected, rtol=1e-4, atol=1e-5)
    fresh = build_part(CrossSpec(width=7), D, 1e-6)
    fresh.o_proj.reset_parameters()
    assert not fresh(x, given(fresh, other, x)).any(), "zero at the start"


@pytest.mark.parametrize("spec", [CrossSpec(width=7), *(SplitAttentionSpec(**s) for s in SPLITS)], ids=str)
def test_in_pieces_with_a_memory(spec: Any) -> None:
    """A few tokens at once, then one at a time, which another path of attention computes."""
    layer, x, other = build(spec), torch.randn(2, T, D), torch.randn(2, T, D)
    extra = torch.randn(2, T, spec.kv_heads * layer.head_dim) if isinstance(spec, SplitAttentionSpec) else x
    whole, memory = layer(x, given(layer, other, extra)), Growing()
    pieces = [slice(0, 2), *(slice(t, t + 1) for t in range(2, T))]
    found = [layer(x[:, at], given(layer, other, extra, at, memory)) for at in pieces]
    torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=1e-4, atol=1e-5)
    assert memory.keys is not None and memory.keys.shape[1] * memory.keys.shape[3] * 2 == spec.cache_values(D)
