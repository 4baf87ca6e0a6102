"""What the modules of all parts have in common."""

from __future__ import annotations

import torch
from torch import nn

from ouroboros.config import AttentionSpec, FeedForwardSpec
from ouroboros.config.part import build
from ouroboros.config.parts.osam import OsamSpec
from ouroboros.nn.part import LoopModule, Projection, Residual, Started


def test_what_a_part_does_not_say_is_plain() -> None:
    x, z = torch.randn(2, 1, 3)
    loop = LoopModule()
    assert loop.enter(x, {}, 0) is x and loop.leave(x, z, {}, 0) is z
    assert Residual.start(None, 3) is Residual.reader(None, 3) is None
    loop.reset_parameters()
    assert Started.PARAMETER_ROLES == {}


def test_linear_maps_of_parts_are_marked() -> None:
    """Converters find them by their class."""
    for part in (build(AttentionSpec(), 16, 1e-6), build(FeedForwardSpec(), 16), build(OsamSpec(), 16, 1e-6)):
        linear = [module for module in part.modules() if isinstance(module, nn.Linear)]
        assert linear and all(isinstance(module, Projection) for module in linear)
