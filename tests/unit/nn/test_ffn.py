"""Feed-forward networks against their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ouroboros.config import FeedForwardSpec
from ouroboros.nn.ffn import FeedForward

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu2": lambda u: u.clamp(min=0) ** 2,
    "leaky_relu2": lambda u: torch.where(u > 0, u, 0.3 * u) ** 2,
    "gelu": lambda u: u * 0.5 * (1 + torch.erf(u / math.sqrt(2))),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["swiglu", "geglu", "relu2", "leaky_relu2", "gelu"])
def test_formula(kind: str, bias: bool) -> None:
    layer = FeedForward(FeedForwardSpec(kind=kind, intermediate_size=7, bias=bias, negative_slope=0.3), 5)
    x = torch.randn(2, 3, 5)

    def linear(name: str, value: Tensor) -> Tensor:
        weight = getattr(layer, name)
        return value @ weight.weight.T + (weight.bias if bias else 0)

    up = linear("up_proj", x)
    if kind in ("swiglu", "geglu"):
        gate = linear("gate_proj", x)
        cubic = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
        hidden = gate * (torch.sigmoid(gate) if kind == "swiglu" else (1 + torch.tanh(cubic)) / 2) * up
    else:
        hidden = FORMULAS[kind](up)
    torch.testing.assert_close(layer(x), linear("down_proj", hidden))


def test_some_have_a_gate() -> None:
    for kind in ("swiglu", "geglu", "relu2", "leaky_relu2", "gelu"):
        layer = FeedForward(FeedForwardSpec(kind=kind, intermediate_size=7), 5)
        assert hasattr(layer, "gate_proj") == (kind in ("swiglu", "geglu"))
        assert (layer.down_proj.bias is None) and (layer.up_proj.bias is None)


def test_dropout_of_the_output_in_training_alone() -> None:
    layer = FeedForward(FeedForwardSpec(intermediate_size=7, bias=True, dropout=0.5), 5)
    x = torch.randn(400, 5)
    dropped = layer(x)
    whole = layer.eval()(x)
    kept = dropped != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])
