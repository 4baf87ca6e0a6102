"""A backward pass by hand says so when it is asked for a second derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ouroboros.nn.once import once_differentiable


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return 2 * gradients[0]


def test_a_first_derivative_passes_and_a_second_is_refused() -> None:
    x = torch.ones(3, requires_grad=True)
    (first,) = torch.autograd.grad(Double.apply(x).sum(), x)
    assert first.tolist() == [2.0] * 3
    with pytest.raises(RuntimeError, match="no second derivatives"):  # torch's decorator would let this one pass
        torch.autograd.grad(Double.apply(x).sum(), x, create_graph=True)
