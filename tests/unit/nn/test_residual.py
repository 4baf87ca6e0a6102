"""Residual connections that add, or replace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec
from ouroboros.config.part import build
from ouroboros.config.parts.residual import AdditiveResidualSpec, NoResidualSpec, ScaledResidualSpec
from ouroboros.config.parts.stem import EmbeddingNormSpec
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.executor import observe
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.nn.residual import AdditiveResidual, ScaledResidual
from ouroboros.nn.visit import VisitContext

NOWHERE: Any = None
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


def test_scaled() -> None:
    x, update = torch.randn(2, 2, 4, 5)
    residual = build(ScaledResidualSpec(), 5, 0.0)
    assert torch.equal(residual(x, update, x, x), x + update), "neutral at the start"
    torch.nn.init.normal_(residual.scale)
    torch.testing.assert_close(residual(x, update, x, x), x + residual.scale * update)
    dropped = build(ScaledResidualSpec(), 5, 0.5)(torch.zeros(1, 90, 5), torch.ones(1, 90, 5), x, x)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}


def test_the_stem_enters_every_block() -> None:
    assert ScaledResidual.entrance(ScaledResidualSpec(), 5) is None
    mix = ScaledResidual.entrance(ScaledResidualSpec(stem_mix=True), 5)
    x, x0 = torch.randn(2, 2, 4, 5)
    visit = VisitContext(NOWHERE, carried={"x0": x0})
    assert mix is not None and torch.equal(mix(x, visit), x), "neutral at the start"
    torch.nn.init.normal_(mix.weight)
    torch.testing.assert_close(mix(x, visit), mix.weight[0] * x + mix.weight[1] * x0)
    mix.reset_parameters()
    assert torch.equal(mix.weight, torch.tensor([[1.0] * 5, [0.0] * 5]))
    narrow = VisitContext(NOWHERE, carried={"x0": x0.bfloat16()})
    assert mix(x.bfloat16(), narrow).dtype == torch.bfloat16


def test_the_stem_is_the_state_before_the_first_block() -> None:
    """In every visit of a model, behind the stem parts."""
    spec = ModelSpec(layout="1 (1)x2", vocab_size=11, hidden_size=8, stem=(EmbeddingNormSpec(),)).replace(
        mixer=AttentionSpec(num_heads=2),
        ffn=FeedForwardSpec(intermediate_size=8),
        residual=ScaledResidualSpec(stem_mix=True),
    )
    model, seen = OuroborosForCausalLM(OuroborosConfig.from_spec(spec)).eval(), []

    def keep(block: object, context: VisitContext, before: Tensor, after: Tensor) -> None:
        assert context.carried is not None
        seen.append((before, context.carried["x0"]))

    with observe(model, keep):
        model(torch.arange(7)[None], use_cache=False)
    assert len(seen) == 3 and all(torch.equal(x0, seen[0][0]) for _, x0 in seen)


def test_none_replaces_the_stream() -> None:
    x, update = torch.randn(2, 2, 4, 5)
    assert build(NoResidualSpec(), 5, 0.0)(x, update, x, x) is update
    dropped = build(NoResidualSpec(), 5, 0.5)(x, torch.ones(1, 90, 5), x, x)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
