"""What is done to the token embeddings before the first visit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ouroboros.config import ModelSpec, RMSNormSpec
from ouroboros.config.part import build
from ouroboros.config.parts.stem import EmbeddingNormSpec, EmbeddingScaleSpec, LearnedPositionsSpec, SmearSpec
from ouroboros.errors import OuroborosError
from ouroboros.nn.memory import Recorder
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


def test_smear_mixes_with_the_token_before() -> None:
    part, x = build(SmearSpec(), ModelSpec(hidden_size=D)), torch.randn(2, 5, D)
    torch.testing.assert_close(part(x, None, VisitContext(NOWHERE))[:, 1:], (x[:, 1:] + x[:, :-1]) / 2)
    torch.nn.init.normal_(part.gate)
    g, y = torch.sigmoid(part.gate), part(x, None, VisitContext(NOWHERE))
    for t in range(5):
        torch.testing.assert_close(y[:, t], (1 - g) * x[:, t] + (g * x[:, t - 1] if t else 0))


def test_smear_keeps_documents_apart_and_skips_padding() -> None:
    """A document is mixed as it is by itself."""
    part, x = build(SmearSpec(boundary=7), ModelSpec(hidden_size=D)), torch.randn(1, 6, D)
    ids = torch.tensor([[7, 1, 2, 7, 3, 1]])
    alone = [part(x[:, at : at + 3], ids[:, at : at + 3], VisitContext(NOWHERE)) for at in (0, 3)]
    torch.testing.assert_close(part(x, ids, VisitContext(NOWHERE)), torch.cat(alone, dim=1))
    mixing = build(SmearSpec(), ModelSpec(hidden_size=D))
    assert not torch.allclose(mixing(x, ids, VisitContext(NOWHERE))[:, 3], alone[1][:, 0])
    padding = torch.tensor([[0, 0, 1, 1, 1, 1]])
    padded = mixing(x, None, VisitContext(NOWHERE, padding=padding))
    torch.testing.assert_close(padded[:, 2:], mixing(x[:, 2:], None, VisitContext(NOWHERE)))


def test_smear_starts_where_it_is_told() -> None:
    x = torch.randn(2, 5, D)
    almost = build(SmearSpec(start=-20.0), ModelSpec(hidden_size=D))(x, None, VisitContext(NOWHERE))
    torch.testing.assert_close(almost, x, rtol=0, atol=1e-7)


def test_smear_remembers_what_it_read() -> None:
    part, x, memory = build(SmearSpec(), ModelSpec(hidden_size=D)), torch.randn(1, 5, D), Recorder()
    part(x, None, VisitContext(NOWHERE, memory=memory))
    assert torch.equal(memory.ends["smear"], x[:, -1:])


def test_a_boundary_needs_ids_and_a_vocabulary_that_has_it() -> None:
    part, x = build(SmearSpec(boundary=7), ModelSpec(hidden_size=D)), torch.randn(1, 2, D)
    with pytest.raises(OuroborosError, match="stem.smear.boundary needs token ids: give input_ids"):
        part(x, None, VisitContext(NOWHERE))
    with pytest.raises(OuroborosError, match="stem.smear.boundary is 7, but the vocabulary has 7 tokens"):
        build(SmearSpec(boundary=7), ModelSpec(vocab_size=7))


def test_embeddings_are_scaled() -> None:
    model, x = ModelSpec(hidden_size=16), torch.randn(1, 2, 16)
    context: Any = None
    assert build(EmbeddingScaleSpec(), model)(x, None, context).equal(4 * x)
    assert build(EmbeddingScaleSpec(factor=0.5), model)(x, None, context).equal(x / 2)
