"""Latent attention against the papers' formulas, one head and one query at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ouroboros.config import RopeSpec
from ouroboros.config.parts.latent import BottleneckAttentionSpec, LatentAttentionSpec
from ouroboros.nn.latent import FEW, BottleneckAttention, LatentAttention
from ouroboros.nn.memory import Memory, Recorder
from ouroboros.nn.rope import Rope, rotate
from ouroboros.nn.visit import VisitContext

HIDDEN, T, HEADS = 24, 6, 3


def rotary(spec: LatentAttentionSpec | BottleneckAttentionSpec, positions: Tensor) -> tuple[Tensor, Tensor]:
    return Rope(spec.rope, spec.rotary_width(HIDDEN))(positions[None])


def given(
    spec: LatentAttentionSpec | BottleneckAttentionSpec, start: int = 0, length: int = T, memory: Memory | None = None
) -> VisitContext:
    """Positions ``start`` on; every key tables from 0 on; a mask where earlier keys exist."""
    end = start + length
    mask = None if start == 0 else torch.ones(end, end).tril().bool()[start:][None, None]
    tables = rotary(spec, torch.arange(end))
    return VisitContext(rotary(spec, torch.arange(start, end)), mask, key_rotary=tables, memory=memory)


def randomised(layer: Any) -> Any:
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return layer


def latent(**changes: Any) -> LatentAttention:
    return randomised(LatentAttention(LatentAttentionSpec(num_heads=HEADS, **changes), HIDDEN, 1e-6))


def bottleneck(**changes: Any) -> BottleneckAttention:
    return randomised(BottleneckAttention(BottleneckAttentionSpec(num_heads=HEADS, **changes), HIDDEN, 1e-6))


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def causal_softmax(scores: Tensor) -> Tensor:
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf).softmax(-1)


def naive_latent(layer: LatentAttention, x: Tensor) -> Tensor:
    """DeepSeek-V2's equations with the weights cut head by head."""
    C, N, r = layer.head_dim, layer.rotary, layer.rank
    tables = rotary(layer.spec, torch.arange(x.shape[1]))
    down = layer.kv_a_proj_with_mqa.weight
    c = rms(x @ down[:r].T, layer.kv_a_layernorm.weight)
    k_rotary = rotate((x @ down[r:].T)[:, None], *tables)[:, 0]
    if hasattr(layer, "q_proj"):
        source, up_q = x, layer.q_proj.weight
    else:
        source, up_q = rms(x @ layer.q_a_proj.weight.T, layer.q_a_layernorm.weight), layer.q_b_proj.weight
    heads = []
    for h in range(HEADS):
        w_q, w_kv = up_q[h * (C + N) : (h + 1) * (C + N)], layer.kv_b_proj.weight[h * 2 * C : (h + 1) * 2 * C]
        q_content, q_rotary = source @ w_q[:C].T, rotate((source @ w_q[C:].T)[:, None], *tables)[:, 0]
        k_content, v = c @ w_kv[:C].T, c @ w_kv[C:].T
        scores = (q_content @ k_content.mT + q_rotary @ k_rotary.mT) / math.sqrt(C + N)
        heads.append(causal_softmax(scores) @ v)
    return torch.cat(heads, dim=-1) @ layer.o_proj.weight.T


def naive_bottleneck(layer: BottleneckAttention, x: Tensor) -> Tensor:
    C, tables = layer.head_dim, rotary(layer.spec, torch.arange(x.shape[1]))
    q, c = x @ (layer.q_b_proj.weight @ layer.q_a_proj.weight).T, x @ layer.kv_a_proj.weight.T
    heads = []
    for h in range(HEADS):
        rows = slice(h * C, (h + 1) * C)
        q_h, k_h, v_h = q[..., rows], c @ layer.k_b_proj.weight[rows].T, c @ layer.v_b_proj.weight[rows].T
        if layer.spec.qk_norm != "none":
            q_h, k_h = rms(q_h, layer.q_norm.weight), rms(k_h, layer.k_norm.weight)
        q_h, k_h = (rotate(t[:, None], *tables)[:, 0] for t in (q_h, k_h))
        heads.append(causal_softmax(q_h @ k_h.mT / math.sqrt(C)) @ v_h)
    return torch.cat(heads, dim=-1) @ layer.o_proj.weight.T


LATENTS: list[dict[str, Any]] = [
    {},
    {"query_rank": 0},
    {"kv_rank": 5, "query_rank": 7, "head_dim": 10, "rope_dim": 6},
    {"rope": RopeSpec(fraction=0.5, scale=2.0)},
]
BOTTLENECKS: list[dict[str, Any]] = [{}, {"latent_rank": 5, "head_dim": 10}, {"qk_norm": "none"}]


class Growing(Recorder):
    """A cache entry for tests."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = self.values = torch.zeros(0)

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        empty = not self.keys.ndim > 1
        self.keys = k if empty else torch.cat((self.keys, k), dim=2)
        self.values = v if empty else torch.cat((self.values, v), dim=2)
        return self.keys, self.values


@pytest.mark.parametrize("changes", LATENTS, ids=str)
def test_latent_formula(changes: dict[str, Any]) -> None:
    layer, x = latent(**changes), torch.randn(2, T, HIDDEN)
    torch.testing.assert_close(layer(x, given(layer.spec)), naive_latent(layer, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", BOTTLENECKS, ids=str)
@pytest.mark.parametrize("cache", ["keys_values", "latent"])
def test_bottleneck_formula(cache: str, changes: dict[str, Any]) -> None:
    layer, x = bottleneck(cache=cache, **changes), torch.randn(2, T, HIDDEN)
    expected = naive_bottleneck(layer, x)
    torch.testing.assert_close(layer(x, given(layer.spec)), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x, given(layer.spec, memory=Recorder())), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [latent, bottleneck, lambda: bottleneck(cache="latent")])
def test_cached_equals_uncached(make: Any) -> None:
    """Step by step: few new tokens before many kept ones take the absorbed form."""
    layer, x = make(), torch.randn(2, 4 * FEW, HIDDEN)
    whole = layer(x, given(layer.spec, length=x.shape[1]))
    memory, pieces = Growing(), []
    for start, length in ((0, 3), (3, 1), (4, 1), (5, 1), (6, 2), *((n, 1) for n in range(8, 4 * FEW))):
        pieces.append(layer(x[:, start : start + length], given(layer.spec, start, length, memory)))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_what_is_kept() -> None:
    """The latent and one rotary key; the latent alone; keys and values of all heads."""
    x = torch.randn(2, T, HIDDEN)
    kept = []
    for layer in (latent(kv_rank=5, rope_dim=6), bottleneck(latent_rank=5, cache="latent"), bottleneck()):
        memory = Growing()
        layer(x, given(layer.spec, memory=memory))
        kept.append((memory.keys.numel() + memory.values.numel()) / (2 * T))
    assert kept == [5 + 6, 5, 2 * HIDDEN]


@pytest.mark.parametrize("queries", [1, 3])
def test_absorbed_is_expanded_with_equal_gradients(queries: int) -> None:
    layer = latent()
    q = torch.randn(2, HEADS, queries, layer.head_dim), torch.randn(2, HEADS, queries, layer.rotary)
    kept = torch.randn(2, 1, 9, layer.rank + layer.rotary)
    mask = torch.rand(2, 1, queries, 9) < 0.7
    mask[..., 0] = True
    found = []
    for form in (layer._expanded, layer._absorbed):
        inputs = [t.clone().requires_grad_() for t in (*q, kept)]
        y = form(*inputs, mask)
        weights = torch.linspace(-1, 1, y.numel()).view_as(y)
        found.append((y, *torch.autograd.grad((y * weights).sum(), [*inputs, layer.kv_b_proj.weight])))
    for expanded, absorbed in zip(*found, strict=True):
        torch.testing.assert_close(absorbed, expanded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [latent, bottleneck])
def test_only_relative_positions_matter(make: Any) -> None:
    layer, x = make(), torch.randn(1, T, HIDDEN)
    shifted = VisitContext(rotary(layer.spec, torch.arange(T) + 50))
    torch.testing.assert_close(layer(x, shifted), layer(x, given(layer.spec)), rtol=1e-4, atol=1e-4)
    swapped = VisitContext(rotary(layer.spec, torch.arange(T).flip(0)))
    assert not torch.allclose(layer(x, swapped), layer(x, given(layer.spec)), atol=1e-3)


@pytest.mark.parametrize("make", [latent, bottleneck])
def test_causal(make: Any) -> None:
    layer, x = make(), torch.randn(1, T, HIDDEN)
    changed = x.clone()
    changed[:, 4:] += 1
    before, after = layer(x, given(layer.spec)), layer(changed, given(layer.spec))
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.allclose(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("make", [latent, bottleneck])
def test_dropout_in_training_alone(make: Any) -> None:
    layer, x = make(dropout=0.5), torch.randn(1, T, HIDDEN)
    assert not torch.equal(layer(x, given(layer.spec)), layer(x, given(layer.spec)))
    layer.eval()
    assert torch.equal(layer(x, given(layer.spec)), layer(x, given(layer.spec)))
