"""What stem parts say of a model."""

from __future__ import annotations

from typing import Any

import pytest

from ouroboros.config import ModelSpec, StemPart
from ouroboros.config.part import kinds
from ouroboros.config.parts.stem import EmbeddingNormSpec, LearnedPositionsSpec, NgramSpec, SmearSpec
from ouroboros.errors import OuroborosError


def test_learned_positions_replace_rotation_and_end() -> None:
    spec = ModelSpec(hidden_size=8, max_position_embeddings=12, stem=(EmbeddingNormSpec(), LearnedPositionsSpec()))
    norm, positions = spec.stem
    assert not spec.rotates and ModelSpec(stem=(norm,)).rotates
    assert (norm.longest(spec), positions.longest(spec)) == (None, 12)
    assert (norm.parameters(spec), positions.parameters(spec)) == (0, 12 * 8)


def test_what_n_grams_and_smear_cost() -> None:
    model = ModelSpec(hidden_size=8)
    mapped, plain = NgramSpec(buckets=10, width=5), NgramSpec(buckets=10, width=8, trigram=True)
    assert (mapped.parameters(model), mapped.flops(model), mapped.recent_values(8)) == (10 * 5 + 5 * 8 + 1, 80, 1)
    assert (plain.parameters(model), plain.flops(model), plain.recent_values(8)) == (10 * 8 + 1, 0, 2)
    assert (SmearSpec().parameters(model), SmearSpec().flops(model), SmearSpec().recent_values(8)) == (8, 0, 8)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (NgramSpec, {"buckets": 1}, "stem.ngram.buckets must be >= 2, got 1"),
        (NgramSpec, {"width": 0}, "stem.ngram.width must be >= 1, got 0"),
        (NgramSpec, {"boundary": -1}, "stem.ngram.boundary must be a token id or null, got -1"),
        (SmearSpec, {"boundary": -1}, "stem.smear.boundary must be a token id or null, got -1"),
    ],
)
def test_ranges(cls: type[StemPart], values: dict[str, Any], message: str) -> None:
    with pytest.raises(OuroborosError, match=message):
        cls(**values)


def test_the_usual_order() -> None:
    """The command line adds parts in the order of the registry: n-grams are normalised with the embeddings."""
    assert list(kinds(StemPart))[:4] == ["ngram", "norm", "positions", "smear"]
