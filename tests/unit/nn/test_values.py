"""The table of values that attention adds to its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ouroboros.config import AttentionSpec, ModelSpec
from ouroboros.config.part import build
from ouroboros.config.parts.values import ValueEmbeddingSpec
from ouroboros.errors import OuroborosError
from ouroboros.nn.part import Init
from ouroboros.nn.visit import VisitContext

NOWHERE: Any = None
MODEL = ModelSpec(vocab_size=1000, hidden_size=16).replace(mixer=AttentionSpec(num_heads=4, num_kv_heads=2))


def test_looks_up_and_leaves_the_stream() -> None:
    part, x, ids = build(ValueEmbeddingSpec(width=5), MODEL), torch.randn(2, 3, 16), torch.randint(0, 1000, (2, 3))
    visit = VisitContext(NOWHERE, carried={})
    assert part(x, ids, visit) is x
    expected = part.scale * (part.embed.weight[ids] @ part.proj.weight.T)
    assert expected.shape == (2, 3, 2 * 4)
    torch.testing.assert_close(visit.carried["values"], expected)
    part(x, ids.flip(0), visit)
    torch.testing.assert_close(visit.carried["values"], expected.flip(0))


def test_starts_small() -> None:
    part = build(ValueEmbeddingSpec(width=64), MODEL)
    torch.nn.init.zeros_(part.scale)
    part.reset_parameters(Init(std=0.02))
    assert part.scale.item() == pytest.approx(0.1)
    assert part.embed.weight.std().item() == pytest.approx(0.01, rel=0.02)


def test_embeddings_cannot_be_looked_up() -> None:
    part = build(ValueEmbeddingSpec(width=5), MODEL)
    with pytest.raises(OuroborosError, match="give input_ids, not inputs_embeds"):
        part(torch.randn(1, 2, 16), None, VisitContext(NOWHERE, carried={}))
