"""What stem parts say of a model."""

from __future__ import annotations

from ouroboros.config import ModelSpec
from ouroboros.config.parts.stem import EmbeddingNormSpec, LearnedPositionsSpec


def test_learned_positions_replace_rotation_and_end() -> None:
    spec = ModelSpec(hidden_size=8, max_position_embeddings=12, stem=(EmbeddingNormSpec(), LearnedPositionsSpec()))
    norm, positions = spec.stem
    assert not spec.rotates and ModelSpec(stem=(norm,)).rotates
    assert (norm.longest(spec), positions.longest(spec)) == (None, 12)
    assert (norm.parameters(spec), positions.parameters(spec)) == (0, 12 * 8)
