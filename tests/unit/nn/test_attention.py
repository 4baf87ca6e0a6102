"""Attention against a naive softmax, head by head."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ouroboros.config import AttentionSpec, RopeSpec
from ouroboros.nn.attention import Attention, attend, exclude
from ouroboros.nn.memory import Recorder
from ouroboros.nn.rope import Rope, rotate
from ouroboros.nn.visit import VisitContext

HIDDEN, T = 24, 5


def given(spec: AttentionSpec, mask: Tensor | None = None, length: int = T) -> VisitContext:
    """Positions 0, 1, ..; no padding."""
    rope = Rope(spec.rope, spec.head_width(HIDDEN))
    return VisitContext(rope(torch.arange(length)[None]), mask)


def rms(x: Tensor, weight: Tensor | float, eps: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "relu": lambda x: x.clamp(min=0),
    "elu+1": lambda x: torch.where(x > 0, x + 1, torch.exp(x)),
}


def mixed(layer: Attention, name: str, u: Tensor, x: Tensor, head: int) -> Tensor:
    """Keys or values of one head after the shift, if the layer has one."""
    if not getattr(layer.spec, f"{name}_shift"):
        return u
    weight = getattr(layer, f"{name}_shift").proj.weight[head]
    y = []
    for t in range(u.shape[1]):
        a = torch.sigmoid(x[:, t] @ weight)[:, None]
        y.append((1 - a) * u[:, t] + (a * u[:, t - 1] if t else 0))
    return torch.stack(y, dim=1)


def naive(layer: Attention, x: Tensor, inputs: VisitContext, allowed: Tensor) -> Tensor:
    """The formula of the class, one query at a time; ``allowed`` (T, T) says who sees whom."""
    spec, C, heads = layer.spec, layer.head_dim, []
    for h in range(spec.num_heads):
        kv = h * spec.kv_heads // spec.num_heads  # the key/value head that query head h reads
        q, k, v = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
        q, k, v = q[..., h * C : (h + 1) * C], k[..., kv * C : (kv + 1) * C], v[..., kv * C : (kv + 1) * C]
        if spec.qk_norm == "before_rope":
            q, k = (
                rms(t, 1 if n.weight is None else n.weight, 1e-6) for t, n in ((q, layer.q_norm), (k, layer.k_norm))
            )
        if spec.value_embedding:
            v = v + layer.value_scale * inputs.carried["values"][..., kv * C : (kv + 1) * C]
        if spec.value_residual is not None:
            own, first = layer.value_mix
            v = own * v + first * inputs.carried["first_values"][..., kv * C : (kv + 1) * C]
        k, v = mixed(layer, "k", k, x, kv), mixed(layer, "v", v, x, kv)
        q, k, v = (FUNCTIONS[getattr(spec, f"{n}_activation")](t) for n, t in zip("qkv", (q, k, v)))
        q, k = (rotate(t[:, None], *inputs.rotary)[:, 0] for t in (q, k))
        if spec.qk_norm == "after_rope":
            q, k = rms(q, layer.q_norm.weight, 1e-6), rms(k, layer.k_norm.weight, 1e-6)
        if spec.query_gain is not None:
            q = q * layer.query_gain[h]
        channels = C if spec.score_channels is None else spec.score_channels
        scores = (q @ k.mT / math.sqrt(channels)).masked_fill(~allowed, -math.inf)
        y = scores.softmax(-1) @ v
        if spec.exclusive:
            direction = v / v.norm(dim=-1, keepdim=True)
            y = y - (y * direction).sum(-1, keepdim=True) * direction
        if spec.head_norm or spec.output_gate:
            y = rms(y, layer.head_norm.weight, 1e-6)
        if spec.output_gate:
            gate = layer.gate_proj(x)[..., h * C : (h + 1) * C]
            y = y * gate * torch.sigmoid(gate)
        if spec.head_gate:
            y = y * 2 * torch.sigmoid(x @ layer.head_gate.weight[h])[..., None]
        heads.append(y)
    return layer.o_proj(torch.cat(heads, dim=-1))


def build(**changes: Any) -> Attention:
    """Attention with all weights random, also those that start at one value."""
    layer = Attention(AttentionSpec(**{"num_heads": 4, **changes}), HIDDEN, 1e-6)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return layer


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "head_dim": 10},
        {"num_heads": 6, "num_kv_heads": 3},
        {"qkv_bias": True, "out_bias": True},
        {"qk_norm": "before_rope", "query_gain": 1.5},
        {"qk_norm": "after_rope", "num_kv_heads": 2},
        {"qk_norm": "before_rope", "num_kv_heads": 2, "score_channels": 3.0},
        {"rope": RopeSpec(fraction=0.5, scale=2.0)},
        {"k_shift": True, "v_shift": True, "num_kv_heads": 2},
        {"k_shift": True, "q_activation": "silu", "k_activation": "elu+1", "v_activation": "relu"},
        {"v_shift": True, "q_activation": "relu", "v_activation": "elu+1", "qk_norm": "after_rope"},
        {"head_norm": True, "head_dim": 10},
        {"output_gate": True, "num_kv_heads": 2},
        {"output_gate": True, "head_norm": True, "v_activation": "silu"},
        {"qk_norm": "before_rope", "qk_norm_gain": False},
        {"head_gate": True, "head_norm": True},
        {"exclusive": True},
        {"exclusive": True, "num_kv_heads": 2, "head_gate": True, "v_activation": "silu"},
        {"num_heads": 6, "num_kv_heads": 3, "exclusive": True, "value_embedding": True},
        {"num_kv_heads": 2, "value_embedding": True, "value_residual": 0.3, "v_shift": True},
    ],
    ids=str,
)
def test_causal_formula(changes: dict[str, Any]) -> None:
    layer, x = build(**changes), torch.randn(2, T, HIDDEN)
    values = torch.randn(2, 2, T, layer.spec.kv_heads * layer.head_dim)
    inputs = given(layer.spec)._replace(carried={"values": values[0], "first_values": values[1]})
    torch.testing.assert_close(
        layer(x, inputs), naive(layer, x, inputs, torch.ones(T, T).tril().bool()), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("additive", [False, True])
def test_mask(kv_heads: int, additive: bool) -> None:
    layer, x = build(num_kv_heads=kv_heads), torch.randn(2, T, HIDDEN)
    allowed = torch.rand(T, T) < 0.5
    allowed.fill_diagonal_(True)
    mask = allowed[None, None]
    inputs = given(layer.spec, torch.zeros(mask.shape).masked_fill(~mask, -math.inf) if additive else mask)
    torch.testing.assert_close(layer(x, inputs), naive(layer, x, inputs, allowed), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_query_head_reads_the_right_key_value_head(kv_heads: int) -> None:
    """Head h of H reads head floor(h K / H): values that name their head show it."""
    v = torch.arange(kv_heads).float()[None, :, None, None].expand(1, kv_heads, 3, 2)
    expected = torch.tensor([h * kv_heads // 4 for h in range(4)]).float()
    for length in (1, 3):  # one query takes another path
        q, k = torch.randn(1, 4, length, 2), torch.randn(1, kv_heads, 3, 2)
        mask = torch.ones(1, 1, length, 3, dtype=torch.bool)
        torch.testing.assert_close(attend(q, k, v, mask)[0, :, 0, 0], expected)


def test_single_query_with_mask_equals_the_full_pass() -> None:
    q, k, v = torch.randn(2, 6, 4, 8), torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8)
    full = attend(q, k, v, None)
    mask = torch.tensor([True, True, True, True])[None, None, None]
    torch.testing.assert_close(attend(q[:, :, 3:], k, v, mask), full[:, :, 3:])
    torch.testing.assert_close(attend(q[:, :, 3:], k, v, None), full[:, :, 3:])


def test_memory_is_extended_with_rotated_keys() -> None:
    layer, x, recorder = build(num_kv_heads=2), torch.randn(1, T, HIDDEN), Recorder()
    inputs = given(layer.spec)
    torch.testing.assert_close(layer(x, inputs._replace(memory=recorder)), layer(x, inputs))
    recorded = recorder.recorded()
    assert recorded.keys is not None and recorded.values is not None
    keys = layer.k_proj(x).view(1, T, 2, -1).transpose(1, 2)
    torch.testing.assert_close(recorded.keys, rotate(keys, *inputs.rotary))
    assert recorded.values.shape == (1, 2, T, layer.head_dim)


def test_dropout_only_in_training() -> None:
    layer, x = build(dropout=0.5), torch.randn(1, T, HIDDEN)
    inputs = given(layer.spec)
    assert not torch.equal(layer(x, inputs), layer(x, inputs))
    layer.eval()
    assert torch.equal(layer(x, inputs), layer(x, inputs))


def test_query_gain_starts_at_its_value() -> None:
    layer = Attention(AttentionSpec(num_heads=4, query_gain=1.5), HIDDEN, 1e-6)
    assert torch.equal(layer.query_gain, torch.full((4,), 1.5))
    torch.nn.init.zeros_(layer.query_gain)
    layer.reset_parameters()
    assert torch.equal(layer.query_gain, torch.full((4,), 1.5))
    assert not hasattr(Attention(AttentionSpec(num_heads=4), HIDDEN, 1e-6), "query_gain")


def test_the_first_visit_hands_its_values_on() -> None:
    """With what the stem adds, before the mixing; the first visit mixes them with themselves."""
    first, later = (build(num_kv_heads=2, value_residual=0.3, value_embedding=True) for _ in range(2))
    x, stem = torch.randn(2, T, HIDDEN), torch.randn(2, T, 2 * first.head_dim)
    carried: dict[str, Tensor] = {"values": stem}
    inputs = given(first.spec)._replace(carried=carried)
    first(x, inputs._replace(first=True))
    torch.testing.assert_close(carried["first_values"], first.v_proj(x) + first.value_scale * stem)
    kept = carried["first_values"]
    later(x, inputs)
    assert carried["first_values"] is kept


def test_new_options_start_where_they_say() -> None:
    spec = AttentionSpec(num_heads=4, value_residual=0.3, head_gate=True, value_embedding=True)
    layer, plain = Attention(spec, HIDDEN, 1e-6), Attention(AttentionSpec(num_heads=4), HIDDEN, 1e-6)
    for parameter in (layer.value_mix, layer.value_scale, layer.head_gate.weight):
        torch.nn.init.normal_(parameter)
    layer.reset_parameters()
    layer.head_gate.reset_parameters()
    torch.testing.assert_close(layer.value_mix.data, torch.tensor([0.7, 0.3]))
    assert layer.value_scale.tolist() == [1.0] and not layer.head_gate.weight.any()
    plain.load_state_dict(layer.state_dict(), strict=False)
    x, carried = torch.randn(1, T, HIDDEN), {"values": torch.zeros(1, T, HIDDEN)}
    mixed = layer(x, given(spec)._replace(carried=carried, first=True))
    torch.testing.assert_close(mixed, plain(x, given(spec)))


def test_xsa_of_a_value_that_is_nothing() -> None:
    y, v = torch.randn(1, 2, 3, 4), torch.zeros(1, 1, 3, 4)
    assert torch.equal(exclude(y, v), y)


def test_options_that_are_off_leave_nothing_behind() -> None:
    names = {name for name, _ in Attention(AttentionSpec(num_heads=4), HIDDEN, 1e-6).named_parameters()}
    assert names == {f"{name}_proj.weight" for name in "qkvo"}
    gated = Attention(AttentionSpec(num_heads=4, output_gate=True, head_norm=True), HIDDEN, 1e-6)
    assert {name for name, _ in gated.named_parameters()} == names | {"gate_proj.weight", "head_norm.weight"}
