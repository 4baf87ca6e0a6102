"""Ranges and sizes of feed-forward networks."""

from __future__ import annotations

from typing import Any

import pytest

from ouroboros.config import FeedForwardSpec, NoFeedForwardSpec
from ouroboros.errors import OuroborosError


@pytest.mark.parametrize(
    ("values", "message"),
    [({"intermediate_size": 0}, "ffn.intermediate_size must be >= 1, got 0"), ({"dropout": 1}, "ffn.dropout")],
)
def test_ranges(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OuroborosError, match=message):
        FeedForwardSpec(**values)


MATRICES = [("swiglu", 3), ("geglu", 3), ("relu2", 2), ("leaky_relu2", 2), ("gelu", 2)]


@pytest.mark.parametrize(("kind", "matrices"), MATRICES)
def test_costs(kind: Any, matrices: int) -> None:
    spec = FeedForwardSpec(kind=kind, intermediate_size=20)
    assert (spec.gated, spec.hidden_width, spec.absent) == (matrices == 3, 20, False)
    assert spec.parameters(8) == matrices * 8 * 20 and spec.flops(8) == 2 * matrices * 8 * 20
    biased = FeedForwardSpec(kind=kind, intermediate_size=20, bias=True)
    assert biased.parameters(8) == matrices * 8 * 20 + (matrices - 1) * 20 + 8


def test_none_costs_nothing() -> None:
    spec = NoFeedForwardSpec()
    assert spec.absent and spec.hidden_width == spec.parameters(8) == spec.flops(8) == 0
