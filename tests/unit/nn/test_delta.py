"""The delta residual and the parts of an expanded state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.errors import OuroborosError
from ouroboros.nn.delta import (
    ChannelCompressor,
    DeltaResidual,
    Expansion,
    Gate,
    TokenCompressor,
    direction,
    gate_bias,
)
from ouroboros.nn.operators import update as closed_form
from ouroboros.nn.part import Init

D = 16
SPECS = {
    "vector": DeltaSpec(),
    "clamped": DeltaSpec(guard="clamped"),
    "linear": DeltaSpec(value="linear"),
    "expanded": DeltaSpec(values=3, kernel=3, gate="two_layer", gate_hidden=5),
    "control": DeltaSpec(values=2, kernel=2, erase=False, value="constant"),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def layer(spec: DeltaSpec, spread: float = 0.5) -> DeltaResidual:
    """A residual with gates and targets all over their ranges."""
    residual = DeltaResidual(spec, D)
    with torch.no_grad():
        for parameter in residual.parameters():
            parameter.normal_(std=spread)
    return residual


def inputs(spec: DeltaSpec, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """State, update, context and read vector."""
    state = torch.randn(2, 5, spec.values, D) if spec.expanded else torch.randn(2, 5, D)
    read = torch.randn(2, 5, D) if spec.expanded else state
    return [t.to(dtype) for t in (state, torch.randn(2, 5, D), torch.randn(2, 5, D), read)]


@every_spec
def test_is_the_published_formula(spec: DeltaSpec) -> None:
    residual, (x, h, context, read) = layer(spec), inputs(spec)
    y = residual(x, h, context, read).double()
    k = (h / h.norm(dim=-1, keepdim=True)).double()
    gate = residual.gate
    hidden = torch.tanh(context @ gate.hidden_proj.weight.T) if spec.gate == "two_layer" else context
    b = 2 * torch.sigmoid(hidden @ gate.proj.weight.T + gate.proj.bias).double()[..., 0]
    if spec.value == "constant":
        v = torch.full((2, 5, spec.values), 2.0).double()
    else:
        logits = (read @ residual.value_proj.weight.T + residual.value_proj.bias).double()
        v = 4 * torch.sigmoid(logits) if spec.value == "sigmoid" else logits
    v = v if spec.expanded else v[..., 0]
    if spec.erase:
        expected = closed_form(x.double(), k, b, v)
    else:
        expected = x + (b[..., None] * v)[..., None] * k[..., None, :]
    torch.testing.assert_close(y, expected, atol=3e-6, rtol=1e-5)


@every_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_update_leaves_the_state_exactly(spec: DeltaSpec, dtype: torch.dtype) -> None:
    x, h, context, read = inputs(spec, dtype)
    h[0] = 0
    y = layer(spec).to(dtype)(x, h, context, read)
    assert y.dtype == dtype
    assert torch.equal(y[0], x[0]) and not torch.equal(y[1], x[1])


@every_spec
@settings(max_examples=25, deadline=None)
@given(size=st.one_of(st.just(0.0), st.floats(-12, 4).map(lambda e: 10.0**e)))
def test_finite_at_every_length_of_the_update(spec: DeltaSpec, size: float) -> None:
    residual = layer(spec)
    x, h, context, read = inputs(spec)
    h = (size * h / h.norm(dim=-1, keepdim=True)).requires_grad_()
    x.requires_grad_()
    y = residual(x, h, context, read)
    y.square().sum().backward()
    for tensor in (y, x.grad, h.grad, *(p.grad for p in residual.parameters())):
        assert tensor is not None and tensor.isfinite().all()
    assert direction(h.detach(), spec).norm(dim=-1).max() <= 1 + 1e-6


@pytest.mark.parametrize("guard", ["additive", "clamped"])
def test_direction_is_unit_until_the_guard(guard: Any) -> None:
    spec = DeltaSpec(guard=guard, eps=1e-3)
    h = torch.randn(D).double()
    h = h / h.norm()
    for size in (0.0, 1e-5, 1e-3, 0.1, 1e4):
        length = size / math.hypot(size, 1e-3) if guard == "additive" else size / max(size, 1e-3)
        torch.testing.assert_close(direction(size * h, spec), length * h)


def gradients(X: Tensor, h: Tensor, gate: Tensor, target: Tensor, G: Tensor, spec: DeltaSpec) -> dict[str, Tensor]:
    """Closed-form gradients for an expanded state (..., V, D), from gate logits (...) and target logits (..., V)."""
    s = torch.rsqrt(h.square().sum(-1, keepdim=True) + spec.eps**2)
    k, b, v = s * h, 2 * torch.sigmoid(gate), spec.value_scale * torch.sigmoid(target)
    error = v - (X @ k[..., None])[..., 0]
    g = (G @ k[..., None])[..., 0]
    dk = b[..., None] * ((error[..., None] * G).sum(-2) - (g[..., None] * X).sum(-2))
    return {
        "x": G - b[..., None, None] * g[..., None] * k[..., None, :],
        "h": s * (dk - k * (k * dk).sum(-1, keepdim=True)),
        "gate": (g * error).sum(-1) * b * (1 - b / 2),
        "target": b[..., None] * g * v * (1 - v / spec.value_scale),
    }


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), V=st.integers(1, 4), eps=st.sampled_from([1e-6, 1e-2, 1.0]))
def test_closed_form_gradients_in_float64(seed: int, V: int, eps: float) -> None:
    spec, draw = DeltaSpec(eps=eps), torch.Generator().manual_seed(seed)
    shapes = {"x": (3, V, D), "h": (3, D), "gate": (3,), "target": (3, V)}
    leaves = {n: torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for n, s in shapes.items()}
    G = torch.randn(3, V, D, generator=draw, dtype=torch.float64)
    k, b = direction(leaves["h"], spec), 2 * torch.sigmoid(leaves["gate"])
    closed_form(leaves["x"], k, b, spec.value_scale * torch.sigmoid(leaves["target"])).backward(G)
    with torch.no_grad():
        expected = gradients(*leaves.values(), G, spec)
    for name, value in expected.items():
        torch.testing.assert_close(leaves[name].grad, value, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("values", [1, 3])
def test_gradients_of_the_layer(values: int) -> None:
    spec = DeltaSpec(values=values, kernel=values)
    residual, (x, h, context, _) = layer(spec), inputs(spec)
    read, G = torch.randn(2, 5, D), torch.randn_like(x)
    leaves = [t.clone().requires_grad_() for t in (x, h, context, read)]
    residual(*leaves).backward(G)
    X, cotangent = (t if values > 1 else t[..., None, :] for t in (x, G))
    with torch.no_grad():
        gate, target = residual.gate.proj(context)[..., 0], residual.value_proj(read)
        exact = gradients(*(t.double() for t in (X, h, gate, target, cotangent)), spec)
    found = {"x": leaves[0].grad, "h": leaves[1].grad, "context": leaves[2].grad, "read": leaves[3].grad}
    expected = {
        "x": exact["x"] if values > 1 else exact["x"][..., 0, :],
        "h": exact["h"],
        "context": exact["gate"][..., None] * residual.gate.proj.weight,
        "read": exact["target"] @ residual.value_proj.weight.double(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.float(), atol=1e-5, rtol=1e-4)
    bias = residual.gate.proj.bias.grad
    torch.testing.assert_close(bias, exact["gate"].sum()[None].float(), atol=1e-4, rtol=1e-4)


def test_bfloat16_is_closer_than_arithmetic_in_bfloat16() -> None:
    spec = DeltaSpec()
    residual = layer(spec, 0.1).to(torch.bfloat16)
    x, h, context, read = inputs(spec, torch.bfloat16)
    exact = residual.float()(*(t.float() for t in (x, h, context, read)))
    residual = residual.to(torch.bfloat16)
    k = h / h.norm(dim=-1, keepdim=True)
    b, v = 2 * torch.sigmoid(residual.gate.proj(context)), 4 * torch.sigmoid(residual.value_proj(read))
    plain = x + b * (v - (k * x).sum(-1, keepdim=True)) * k
    error = (residual(x, h, context, read).float() - exact).abs()
    assert error.max() <= (plain.float() - exact).abs().max()
    torch.testing.assert_close(error, torch.zeros_like(error), atol=2**-7, rtol=0)  # half a step at 2..4


@every_spec
def test_autocast_does_not_lower_the_precision(spec: DeltaSpec) -> None:
    residual, given = layer(spec), inputs(spec)
    with torch.autocast("cpu", torch.bfloat16):
        low = residual(*given)
    assert torch.equal(low, residual(*given))


def test_terms_are_what_the_update_uses() -> None:
    spec = SPECS["expanded"]
    residual, (x, h, context, read) = layer(spec), inputs(spec)
    k, b, v = residual.terms(h, context, read)
    assert k.shape == (2, 5, D) and b.shape == (2, 5, 1) and v.shape == (2, 5, 3)
    torch.testing.assert_close(residual(x, h, context, read), closed_form(x, k, b[..., 0], v))
    assert (b > 0).all() and (b < 2).all() and (v > 0).all() and (v < 4).all()


def test_dropout_of_the_whole_update_keeps_the_state() -> None:
    residual = DeltaResidual(DeltaSpec(), D, dropout=0.999999)
    given = inputs(DeltaSpec())
    assert torch.equal(residual(*given), given[0])
    assert not torch.equal(residual.eval()(*given), given[0])


def test_gate_starts_where_the_specification_says() -> None:
    for start, bias in ((0, -13.8155), (0.01, -5.2933), (0.5, -1.0986), (1, 0), (1.5, 1.0986), (2, 13.8155)):
        assert gate_bias(start) == pytest.approx(bias, abs=1e-4)
        gate = Gate(DeltaSpec(beta_init=start), D)
        torch.nn.init.constant_(gate.proj.bias, 9)
        gate.proj.reset_parameters(Init(std=0.02))
        assert gate.proj.bias.item() == pytest.approx(bias, abs=1e-4)
        assert gate(torch.zeros(1, D)).item() == pytest.approx(start, abs=1e-5)


def test_target_biases_start_within_the_root_of_the_width() -> None:
    residual = DeltaResidual(DeltaSpec(values=64, kernel=64), D)
    torch.nn.init.constant_(residual.value_proj.bias, 9)
    residual.value_proj.reset_parameters(Init(std=0.02))
    size = residual.value_proj.bias.abs().max().item()
    assert 0.8 * D**-0.5 < size <= D**-0.5


@pytest.mark.parametrize(("values", "kernel"), [(1, 1), (3, 3), (4, 4), (2, 5)])
def test_channel_compressor_is_a_filter_along_the_channels(values: int, kernel: int) -> None:
    compressor = ChannelCompressor(DeltaSpec(values=values, kernel=kernel), D)
    x = torch.randn(2, 5, values, D)
    torch.testing.assert_close(compressor(x, None, None, "mixer"), x.mean(2))
    torch.nn.init.normal_(compressor.weight)
    torch.nn.init.normal_(compressor.read)
    left = (kernel - 1) // 2
    padded = torch.nn.functional.pad(x.transpose(2, 3), (left, kernel - 1 - left))  # (B, T, D, V + K - 1)
    windows = padded.unfold(-1, kernel, 1)  # (B, T, D, V, K)
    expected = torch.einsum("btdvk,dk,v->btd", windows, compressor.weight, compressor.read)
    torch.testing.assert_close(compressor(x, None, None, "mixer"), expected, atol=1e-5, rtol=1e-5)


def causal(x: Tensor, weight: Tensor) -> Tensor:
    """``sum_s w_s x_(t-K+1+s)``, one position at a time; (B, T, V, D) and (K, V, D)."""
    K, out = len(weight), torch.zeros(*x.shape[:2], *weight.shape[1:])
    for t in range(x.shape[1]):
        for s in range(K):
            if t - K + 1 + s >= 0:
                out[:, t] += weight[s] * x[:, t - K + 1 + s]
    return out


def test_token_compressor_is_a_causal_filter_over_tokens() -> None:
    compressor = TokenCompressor(DeltaSpec(values=3, compressor="token", kernel=4), D)
    x = torch.randn(2, 6, 3, D)
    torch.testing.assert_close(compressor(x, None, None, "mixer"), x.mean(2))
    torch.nn.init.normal_(compressor.weight)
    torch.nn.init.normal_(compressor.read)
    expected = (causal(x, compressor.weight) * compressor.read[:, None]).sum(2)
    torch.testing.assert_close(compressor(x, None, None, "mixer"), expected, atol=1e-5, rtol=1e-5)
    short = compressor(x[:, :2], None, None, "mixer")
    torch.testing.assert_close(short, expected[:, :2], atol=1e-5, rtol=1e-5)


def test_padded_states_do_not_leak_through_the_filter() -> None:
    compressor = TokenCompressor(DeltaSpec(values=3, compressor="token", kernel=4), D)
    torch.nn.init.normal_(compressor.weight)
    x, padding = torch.randn(1, 6, 3, D), torch.tensor([[0, 0, 1, 1, 1, 1]])
    padded = compressor(x, None, padding, "mixer")[:, 2:]
    torch.testing.assert_close(padded, compressor(x[:, 2:], None, None, "mixer"))


def test_expansion_copies_or_filters() -> None:
    e = torch.randn(2, 6, D)
    copies = e[:, :, None].expand(2, 6, 3, D)
    assert torch.equal(Expansion(DeltaSpec(values=3), D)(e, None, None), copies)
    filtered = Expansion(DeltaSpec(values=3, embedding_conv=True, embedding_kernel=2), D)
    assert torch.equal(filtered(e, None, None), copies)
    torch.nn.init.normal_(filtered.weight)
    torch.testing.assert_close(filtered(e, None, None), causal(e[:, :, None], filtered.weight))


def test_parts_are_built_for_expanded_states_alone() -> None:
    vector, expanded, tokens = DeltaSpec(), DeltaSpec(values=4), DeltaSpec(values=4, compressor="token")
    assert DeltaResidual.start(vector, D) is None and DeltaResidual.reader(vector, D) is None
    assert isinstance(DeltaResidual.reader(expanded, D), ChannelCompressor)
    assert isinstance(DeltaResidual.reader(tokens, D), TokenCompressor)
    assert isinstance(DeltaResidual.start(expanded, D), Expansion)


@pytest.mark.parametrize("compressor", ["channel", "token"])
def test_compressors_start_as_an_average_or_as_every_weight(compressor: Any) -> None:
    x = torch.randn(2, 5, 4, D)
    for init in ("average", "normal"):
        spec = DeltaSpec(values=4, compressor=compressor, compressor_init=init)
        reader = DeltaResidual.reader(spec, D)
        torch.nn.init.constant_(reader.weight, 9)
        torch.nn.init.constant_(reader.read, 9)
        reader.reset_parameters(Init(std=0.3))
        assert torch.equal(reader.read, torch.full((4,), 0.25))
        if init == "average":
            torch.testing.assert_close(reader(x, None, None, "mixer"), x.mean(2))
        else:
            assert reader.weight.std().item() == pytest.approx(0.3, abs=0.07)


def test_unread_channels_are_refused() -> None:
    with pytest.raises(OuroborosError, match="leaves value channels unread"):
        DeltaSpec(values=4, kernel=3)
