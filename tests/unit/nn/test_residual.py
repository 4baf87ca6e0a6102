"""The additive residual, and which residual a specification names."""

from __future__ import annotations

import torch

from ouroboros.config import ModelSpec
from ouroboros.nn.delta import DeltaResidual
from ouroboros.nn.residual import AdditiveResidual, build_residual


def test_adds() -> None:
    x, update, context, read = torch.randn(4, 2, 4, 5)
    residual = AdditiveResidual()
    assert torch.equal(residual(x, update, context, read), x + update)
    assert list(residual.parameters()) == []


def test_dropout_scales_the_update_alone() -> None:
    residual = AdditiveResidual(0.5)
    x, update = torch.zeros(1, 1, 1000), torch.ones(1, 1, 1000)
    joined = residual(x, update, x, x)
    assert set(joined.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(residual.eval()(x, update, x, x), update)


def test_built_from_the_specification() -> None:
    plain, dropped = build_residual(ModelSpec()), build_residual(ModelSpec(dropout=0.25))
    assert isinstance(plain, AdditiveResidual) and plain.dropout is None
    assert isinstance(dropped, AdditiveResidual) and dropped.dropout is not None and dropped.dropout.p == 0.25
    delta = build_residual(ModelSpec(residual="delta", dropout=0.25))
    assert isinstance(delta, DeltaResidual) and delta.dropout is not None and delta.dropout.p == 0.25
