"""Ranges, place and cost of feed-forward networks with a narrow passage."""

from __future__ import annotations

from typing import Any

import pytest

from ouroboros.accounting import cost
from ouroboros.config import ModelSpec
from ouroboros.config.parts.choke import ChokeSpec
from ouroboros.errors import OuroborosError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"intermediate_size": 0}, "ffn.intermediate_size must be >= 1, got 0"),
        ({"choke_size": 0}, "ffn.choke_size must be >= 1, got 0"),
        ({"groups": 0}, "ffn.groups must be >= 1, got 0"),
        ({"loops": 0}, "ffn.loops must be >= 1 or null, got 0"),
        ({"shape": "grouped", "groups": 5}, r"ffn.groups \(5\) must divide ffn.intermediate_size \(512\) and .*\(64\)"),
        ({"shape": "grouped", "choke_size": 12}, r"ffn.groups \(8\) must divide"),
    ],
    ids=str,
)
def test_ranges(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OuroborosError, match=message):
        ChokeSpec(**values)
    ChokeSpec(groups=5)  # groups of another shape say nothing


D, F, C, L = 8, 24, 4, 3


@pytest.mark.parametrize(
    ("shape", "shared", "each"),
    [
        ("flat", D * F, C * F + D * C),
        ("pyramid", 2 * D * F, C * D + D * C),
        ("pyramid_residual", 2 * D * F, C * D + D * C),
        ("grouped", D * F, 2 * (F // 2) * (C // 2) + D * C),
        ("residual", 2 * D * F, C * F + D * C),
    ],
)
def test_costs(shape: Any, shared: int, each: int) -> None:
    """Maps of each loop are stored, and one set of them is used at a time."""
    spec = ChokeSpec(shape=shape, intermediate_size=F, choke_size=C, groups=2, loops=L)
    assert (spec.parameters(D), spec.flops(D), spec.hidden_width) == (shared + L * each, 2 * (shared + each), F)


def test_has_maps_for_the_loops_of_its_place() -> None:
    model = ModelSpec(layout="1 (1)x4 1").replace(ffn=ChokeSpec())
    assert [block.ffn.loops for block in model.blocks] == [1, 4, 1]
    more = ModelSpec(layout="1 (1)x4 1").replace(ffn=ChokeSpec(loops=6))
    assert [block.ffn.loops for block in more.blocks] == [6, 6, 6]
    assert cost(model, loops=9).parameters == cost(model).parameters
