"""RMSNorm and LayerNorm against their formulas."""

from __future__ import annotations

import pytest
import torch

from ouroboros.config import LayerNormSpec, NormPart, RMSNormSpec
from ouroboros.config.part import build
from ouroboros.nn.norm import LayerNorm, RMSNorm, rms_norm


def test_formula() -> None:
    norm, x = RMSNorm(6, eps=1e-3), torch.randn(2, 5, 6)
    torch.nn.init.normal_(norm.weight)
    expected = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-3) * norm.weight
    torch.testing.assert_close(norm(x), expected)


def test_starts_at_unit_gain_and_keeps_the_sign() -> None:
    x = torch.tensor([[3.0, -4.0]])
    torch.testing.assert_close(RMSNorm(2, eps=1e-9)(x), x / 12.5**0.5)


def test_low_precision_is_computed_in_float32() -> None:
    # 300^2 overflows float16; the mean square does not have to.
    x = torch.full((1, 8), 300.0, dtype=torch.float16)
    y = RMSNorm(8).half()(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), torch.ones(1, 8))


def test_zero_input_is_finite() -> None:
    assert torch.equal(RMSNorm(4)(torch.zeros(1, 4)), torch.zeros(1, 4))


def test_printed_form() -> None:
    assert repr(RMSNorm(4, eps=1e-5)) == "RMSNorm(4, eps=1e-05)"


def test_formula_of_layer_norm() -> None:
    norm, x = LayerNorm(6, eps=1e-3), 3 * torch.randn(2, 5, 6) + 1
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-3) * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), expected)
    published = torch.nn.LayerNorm(6, eps=1e-3)
    published.load_state_dict(norm.state_dict())
    torch.testing.assert_close(norm(x), published(x))


def test_layer_norm_starts_neutral_and_a_constant_is_nothing() -> None:
    norm = LayerNorm(4)
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    torch.testing.assert_close(norm(x), (x - 2.5) / 1.25**0.5, atol=1e-5, rtol=0)
    assert torch.equal(norm(torch.full((1, 4), 7.0)), torch.zeros(1, 4))
    assert repr(norm) == "LayerNorm(4, eps=1e-05)"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_layer_norm_is_computed_in_float32_or_wider(dtype: torch.dtype) -> None:
    x = torch.tensor([[400.0, -400.0] * 4], dtype=dtype)  # its square overflows float16
    y = LayerNorm(8).to(dtype)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), x.double() / 400, atol=1e-2 if dtype != torch.float64 else 1e-9, rtol=0)


@pytest.mark.parametrize(("spec", "expected"), [(RMSNormSpec(eps=3e-4), RMSNorm), (LayerNormSpec(eps=3e-4), LayerNorm)])
def test_norm_by_specification(spec: NormPart, expected: type) -> None:
    norm = build(spec, 6)
    assert type(norm) is expected and norm.eps == 3e-4 and norm.weight.shape == (6,)
    fresh = {name: value.clone() for name, value in norm.state_dict().items()}
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    norm.reset_parameters()
    assert all(torch.equal(value, fresh[name]) for name, value in norm.state_dict().items())


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 5, 8), (2, 3, 4, 8)])
def test_the_training_way_is_rms_norm_with_its_gradients(shape):
    x, weight = torch.randn(shape).requires_grad_(), torch.randn(8).requires_grad_()
    upstream = torch.randn(shape).transpose(0, -1).contiguous().transpose(0, -1)  # not contiguous
    fast, plain = (rms_norm(x, weight, 1e-5, once=once) for once in (True, False))
    torch.testing.assert_close(fast, plain)
    ours, theirs = (torch.autograd.grad(y, (x, weight), upstream) for y in (fast, plain))
    torch.testing.assert_close(ours, theirs)


def test_rms_norm_has_second_derivatives_outside_of_training():
    x, weight = torch.randn(3, 8).requires_grad_(), torch.randn(8).requires_grad_()
    (first,) = torch.autograd.grad(rms_norm(x, weight, 1e-5, once=False).square().sum(), x, create_graph=True)
    first.sum().backward()
    with pytest.raises(RuntimeError, match="no second derivatives: call model.eval"):
        torch.autograd.grad(rms_norm(x, weight, 1e-5, once=True).sum(), x, create_graph=True)


def test_autocast_does_not_round_the_norm():
    x, weight = torch.randn(3, 8), torch.randn(8)
    with torch.autocast("cpu", torch.bfloat16):
        found = rms_norm(x, weight, 1e-5, once=True)
    assert torch.equal(found, rms_norm(x, weight, 1e-5, once=True)) and found.dtype == torch.float32


@pytest.mark.parametrize("spec", [RMSNormSpec(), RMSNormSpec(gain=False), LayerNormSpec()], ids=str)
def test_depth_scale(spec: NormPart) -> None:
    """What the norm returns, divided by the root of the depth."""
    x, scaled = torch.randn(2, 5, 6), build(spec.replace(depth_scale=True, depth=4), 6)
    plain = build(spec, 6)
    for ours, theirs in zip(scaled.parameters(), plain.parameters(), strict=True):
        ours.data.copy_(torch.nn.init.normal_(theirs))
    torch.testing.assert_close(scaled(x), plain(x) / 2)
    assert torch.equal(build(spec.replace(depth=4), 6)(x), build(spec, 6)(x)), "a depth alone does nothing"


def test_without_a_gain() -> None:
    norm, x = build(RMSNormSpec(gain=False, eps=1e-3), 6), torch.randn(2, 5, 6, requires_grad=True)
    assert list(norm.parameters()) == []
    torch.testing.assert_close(norm(x), x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-3))
    norm.reset_parameters()
