"""RMSNorm against its formula."""

from __future__ import annotations

import torch

from ouroboros.nn.norm import RMSNorm


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
