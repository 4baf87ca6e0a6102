"""Feed-forward networks with a narrow passage for each loop, against their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ouroboros.config.part import build as build_part
from ouroboros.config.parts.choke import ChokeSpec
from ouroboros.nn.choke import ChokedFeedForward
from ouroboros.nn.part import Init, Started
from ouroboros.nn.visit import VisitContext
from ouroboros.schedule import Visit

D, F, C, G, LOOPS = 6, 12, 4, 2, 3
SHAPES = ("flat", "pyramid", "pyramid_residual", "grouped", "residual")
NOWHERE: Any = None


def spec(shape: Any, **changes: Any) -> ChokeSpec:
    return ChokeSpec(shape=shape, intermediate_size=F, choke_size=C, groups=G, loops=LOOPS, **changes)


def build(given: ChokeSpec) -> ChokedFeedForward:
    """The network with all weights random."""
    layer = build_part(given, D)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def visited(loop: int) -> VisitContext:
    return VisitContext(NOWHERE, visit=Visit(slot=9, block=4, loop=loop))


def reference(layer: ChokedFeedForward, x: Tensor, loop: int, slope: float) -> Tensor:
    """The table of the published shapes, maps written out."""

    def act(u: Tensor) -> Tensor:
        return torch.where(u > 0, u, slope * u) ** 2

    h, shape = act(x @ layer.up_proj.weight.T), layer.spec.shape
    up = layer.choke_up[loop].weight.T
    if shape == "grouped":
        parts = h.split(F // G, dim=-1)
        return act(torch.cat([part @ layer.group_down[loop, g] for g, part in enumerate(parts)], dim=-1)) @ up
    down = layer.choke_down[loop].weight.T
    if shape.startswith("pyramid"):
        s = act(h @ layer.stage.weight.T)
        return act(s @ down) @ up + (s if shape == "pyramid_residual" else 0)
    return act(h @ down) @ up + (h @ layer.bypass.weight.T if shape == "residual" else 0)


@pytest.mark.parametrize(("activation", "slope"), [("relu2", 0.0), ("leaky_relu2", 0.3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_formula_by_loop_and_the_last_maps_beyond(shape: str, activation: Any, slope: float) -> None:
    layer = build(spec(shape, activation=activation, negative_slope=0.3))
    x = torch.randn(2, 5, D)
    for loop, row in ((0, 0), (1, 1), (2, 2), (3, 2), (7, 2)):
        torch.testing.assert_close(layer(x, visited(loop)), reference(layer, x, row, slope), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(layer(x, visited(0)), layer(x, visited(1)))
    assert torch.equal(layer(x), layer(x, visited(0)))


@pytest.mark.parametrize("shape", SHAPES)
def test_start_and_counts(shape: str) -> None:
    """The passage adds nothing at the start, and the maps before it are drawn."""
    given = spec(shape)
    layer = build(given)
    assert sum(p.numel() for p in layer.parameters()) == given.parameters(D)
    for module in layer.modules():
        if isinstance(module, Started):
            module.reset_parameters(Init(std=0.02))
    assert not any(up.weight.any() for up in layer.choke_up)
    if shape == "grouped":
        big = build_part(ChokeSpec(shape="grouped", intermediate_size=512, choke_size=64, loops=2), D)
        assert big.group_down.std().item() == pytest.approx(0.02, rel=0.05)
    y = layer(torch.randn(2, 5, D), visited(1))
    assert y.any() == (shape in ("pyramid_residual", "residual"))


def test_low_precision_states_keep_their_dtype() -> None:
    layer, x = build(spec("grouped")).bfloat16(), torch.randn(1, 2, D, dtype=torch.bfloat16)
    assert layer(x, visited(0)).dtype == torch.bfloat16
