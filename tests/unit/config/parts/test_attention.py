"""Ranges and resolved sizes of attention."""

from __future__ import annotations

from typing import Any

import pytest

from ouroboros.config import AttentionSpec, BlockSpec, ModelSpec, RopeSpec
from ouroboros.errors import OuroborosError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_heads": 0}, "mixer.num_heads must be >= 1, got 0"),
        ({"num_kv_heads": 0}, "mixer.num_kv_heads"),
        ({"num_kv_heads": 3}, "multiple of mixer.num_kv_heads"),
        ({"head_dim": 0}, "mixer.head_dim must be >= 1 or null, got 0"),
        ({"dropout": 1.0}, r"mixer.dropout must be in \[0, 1\), got 1.0"),
    ],
    ids=str,
)
def test_ranges(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OuroborosError, match=message):
        AttentionSpec(**values)


def test_heads_share_the_width_unless_they_have_their_own() -> None:
    with pytest.raises(OuroborosError, match="multiple of mixer.num_heads"):
        ModelSpec(hidden_size=30)
    assert ModelSpec(hidden_size=30, block=BlockSpec(mixer=AttentionSpec(head_dim=8))).hidden_size == 30
    for heads, width in ((AttentionSpec(num_heads=4), 8), (AttentionSpec(num_heads=4, head_dim=5), 5)):
        assert heads.head_width(32) == heads.rotary_width(32) == width
        assert heads.rotary(32) == (RopeSpec(), width)


def test_the_output_gate_includes_the_norm() -> None:
    assert not AttentionSpec().normalises_heads
    assert AttentionSpec(output_gate=True).normalises_heads and AttentionSpec(head_norm=True).normalises_heads


def test_heads() -> None:
    assert AttentionSpec(num_heads=6).heads(24) == (6, 6, 4)
    assert AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=5).heads(24) == (6, 2, 5)
