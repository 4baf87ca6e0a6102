"""The additive residual."""

from __future__ import annotations

import torch

from ouroboros.config.part import build
from ouroboros.config.parts.residual import AdditiveResidualSpec
from ouroboros.nn.residual import AdditiveResidual

SPEC = AdditiveResidualSpec()


def test_adds() -> None:
    x, update, context, read = torch.randn(4, 2, 4, 5)
    residual = build(SPEC, 5, 0.0)
    assert torch.equal(residual(x, update, context, read), x + update)
    assert list(residual.parameters()) == []


def test_dropout_scales_the_update_alone() -> None:
    residual = build(SPEC, 1000, 0.5)
    x, update = torch.zeros(1, 1, 1000), torch.ones(1, 1, 1000)
    joined = residual(x, update, x, x)
    assert set(joined.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(residual.eval()(x, update, x, x), update)


def test_its_stream_is_the_embeddings_and_is_read_as_it_is() -> None:
    assert isinstance(build(SPEC, 5, 0.0), AdditiveResidual)
    assert AdditiveResidual.start(SPEC, 5) is None and AdditiveResidual.reader(SPEC, 5) is None
    assert SPEC.channels == 1
