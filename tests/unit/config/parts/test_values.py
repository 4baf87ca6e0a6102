"""Ranges and cost of the table of values, and the blocks that read it."""

from __future__ import annotations

import pytest

from ouroboros.config import AttentionSpec, BlockOverride, ModelSpec
from ouroboros.config.parts.values import ValueEmbeddingSpec
from ouroboros.errors import OuroborosError

STEM = (ValueEmbeddingSpec(width=5),)


def test_cost_and_range() -> None:
    model = ModelSpec(vocab_size=11, hidden_size=16).replace(mixer=AttentionSpec(num_heads=4, num_kv_heads=2))
    assert STEM[0].parameters(model) == 11 * 5 + 5 * 8 + 1 and STEM[0].flops(model) == 2 * 5 * 8
    with pytest.raises(OuroborosError, match="stem.value_embedding.width must be >= 1, got 0"):
        ValueEmbeddingSpec(width=0)


def test_a_block_that_reads_needs_the_table_and_its_heads() -> None:
    with pytest.raises(OuroborosError, match="needs the stem part that looks values up: --model.stem.value_embedding"):
        ModelSpec().replace(mixer=AttentionSpec(value_embedding=True))
    reads = {"mixer.value_embedding": True}
    ModelSpec(stem=STEM, overrides=(BlockOverride(where="2", set=reads),))
    other = BlockOverride(where="2", set={**reads, "mixer.num_kv_heads": 1})
    with pytest.raises(OuroborosError, match="mixer.value_embedding needs the key/value heads of the other blocks"):
        ModelSpec(stem=STEM, overrides=(other,))
