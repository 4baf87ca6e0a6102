"""Ranges of rotary embedding."""

from __future__ import annotations

from typing import Any

import pytest

from ouroboros.config import RopeSpec
from ouroboros.errors import OuroborosError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base": 1}, "rope.base"),
        ({"fraction": 1.1}, "rope.fraction"),
        ({"scale": 0}, "rope.scale"),
        ({"loop_scales": (9.0, 0.0)}, r"rope.loop_scales must be > 0, got \(9.0, 0.0\)"),
        ({"slowing": 0.0}, "rope.slowing must be > 0, got 0.0"),
        ({"slowing_context": 0}, "rope.slowing_context must be >= 1, got 0"),
        ({"slowing_low": 4.0}, r"rope.slowing_low \(4.0\) must be > 0 and < rope.slowing_high \(4.0\)"),
        ({"original_context": 0}, "rope.original_context must be >= 1 or null, got 0"),
    ],
)
def test_ranges(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OuroborosError, match=message):
        RopeSpec(**values)


@pytest.mark.parametrize("context", [1000, 1024, 2048])
def test_rescaled_to_a_longer_context_and_divided_by_use(context: int) -> None:
    """16 of 64 channels, as published: 2048 tokens make a base of 10000 * 2^(16/14)."""
    spec = RopeSpec(fraction=16 / 64, scale=2.0, original_context=1024, loop_scales=(9.0, 1.0))
    found = spec.by_use(64, context)
    assert [use.scale for use in found] == [18.0, 2.0]
    assert [use.base for use in found] == pytest.approx([22_082 if context == 2048 else 10_000] * 2, abs=1)
    assert all(use.fraction == spec.fraction and use.by_use(64, context) == (use,) for use in found)


def test_without_options_and_where_the_power_has_no_value() -> None:
    assert RopeSpec().by_use(64, 10**6) == (RopeSpec(),)
    for channels in (0, 2):
        assert RopeSpec(original_context=4).by_use(channels, 8) == (RopeSpec(),)
