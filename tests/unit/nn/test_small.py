"""Linear maps to a few numbers: how they start, and how they are trained."""

from __future__ import annotations

import torch
from torch import nn

from ouroboros.nn.part import Init
from ouroboros.nn.small import SmallLinear
from ouroboros.optim import parameter_roles


def test_biases_start_in_their_range_and_weights_as_every_matrix() -> None:
    layer = SmallLinear(400, 100, bias=(2.0, 3.0))
    for _ in range(2):
        assert layer.bias.min() >= 2 and layer.bias.max() <= 3 and layer.bias.std() > 0.2
        nn.init.constant_(layer.bias, 9)
        layer.reset_parameters(Init(std=0.3))
        assert abs(layer.weight.std().item() - 0.3) < 0.01


def test_without_biases() -> None:
    layer = SmallLinear(400, 10)
    assert layer.bias is None
    layer.reset_parameters(Init(std=0.3))
    assert abs(layer.weight.std().item() - 0.3) < 0.02
    x = torch.randn(2, 400)
    torch.testing.assert_close(layer(x), x @ layer.weight.T)


def test_is_trained_as_vectors() -> None:
    assert set(parameter_roles(nn.Sequential(SmallLinear(6, 1, bias=(0.0, 0.0)))).values()) == {"vector"}
