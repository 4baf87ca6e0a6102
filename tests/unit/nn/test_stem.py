"""What is done to the token embeddings before the first visit."""

from __future__ import annotations

from typing import Any

import torch

from ouroboros.config import ModelSpec, RMSNormSpec
from ouroboros.config.part import build
from ouroboros.config.parts.stem import EmbeddingNormSpec, LearnedPositionsSpec
from ouroboros.nn.visit import VisitContext

NOWHERE: Any = None
D = 8


def test_embedding_norm_has_the_norms_eps_and_no_gain() -> None:
    model = ModelSpec(hidden_size=D).replace(norm=RMSNormSpec(eps=0.5))
    part, x = build(EmbeddingNormSpec(), model), torch.randn(2, 5, D)
    expected = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 0.5)
    torch.testing.assert_close(part(x, None, VisitContext(NOWHERE)), expected)
    assert list(part.parameters()) == []


def test_learned_positions_are_those_of_the_text() -> None:
    """Registers come before the text and have no row."""
    part, x = build(LearnedPositionsSpec(), ModelSpec(hidden_size=D, max_position_embeddings=12)), torch.randn(2, 3, D)
    assert part.weight.shape == (12, D)
    positions = torch.tensor([[4, 5, 6]])
    torch.testing.assert_close(part(x, None, VisitContext(NOWHERE, positions=positions)), x + part.weight[4:7])
    behind = build(LearnedPositionsSpec(), ModelSpec(hidden_size=D, max_position_embeddings=12, registers=3))
    behind.load_state_dict(part.state_dict())
    moved = behind(x, None, VisitContext(NOWHERE, positions=positions + 3))
    torch.testing.assert_close(moved, x + part.weight[4:7])
    narrow = part(x.bfloat16(), None, VisitContext(NOWHERE, positions=positions))
    assert narrow.dtype == torch.bfloat16
