"""Ranges and cost of the delta-rule memory."""

from __future__ import annotations

from typing import Any

import pytest

from ouroboros.accounting import cost
from ouroboros.config import BlockSpec, ModelSpec
from ouroboros.config.parts.delta_rule import CHUNK, DeltaRuleSpec, chunks
from ouroboros.errors import OuroborosError


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"num_heads": 0}, r"mixer\.num_heads must be >= 1, got 0"),
        ({"head_dim": 0}, r"mixer\.head_dim must be >= 1 or null, got 0"),
        ({"conv": -1}, r"mixer\.conv must be >= 0, got -1"),
    ],
    ids=str,
)
def test_ranges(option: dict[str, Any], words: str) -> None:
    with pytest.raises(OuroborosError, match=words):
        DeltaRuleSpec(**option)


def test_heads_fit_the_width_or_have_their_own() -> None:
    ModelSpec(hidden_size=12, block=BlockSpec(mixer=DeltaRuleSpec(num_heads=5, head_dim=3)))
    with pytest.raises(OuroborosError, match=r"hidden_size \(12\) must be a multiple of mixer\.num_heads \(5\)"):
        ModelSpec(hidden_size=12, block=BlockSpec(mixer=DeltaRuleSpec(num_heads=5)))


def test_cost() -> None:
    D, H, C, K = 20, 3, 7, 4
    spec = DeltaRuleSpec(num_heads=H, head_dim=C, conv=K)
    assert spec.heads(D) == (H, H, C) and DeltaRuleSpec(num_heads=2).heads(D) == (2, 2, 10)
    assert spec.parameters(D) == 4 * D * H * C + D * H + H + K * 3 * H * C
    assert (spec.cache_values(D), spec.state_values(D), spec.recent_values(D)) == (0, H * C * C, (K - 1) * 3 * H * C)
    assert DeltaRuleSpec(num_heads=2).recent_values(D) == DeltaRuleSpec(num_heads=2, conv=1).recent_values(D) == 0


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, (1, 1)), (CHUNK, (1, CHUNK)), (CHUNK + 1, (2, CHUNK // 2 + 1)), (200, (4, 50))]
)
def test_chunks_are_about_equal(tokens: int, expected: tuple[int, int]) -> None:
    assert chunks(tokens) == expected


def test_operations_do_not_grow_with_the_text() -> None:
    model = ModelSpec(hidden_size=32, block=BlockSpec(mixer=DeltaRuleSpec()))
    long = cost(model, context=100 * CHUNK).flops_per_token
    assert cost(model, context=10_000 * CHUNK).flops_per_token < 1.01 * long
    assert cost(model, context=8).flops_per_token < long
