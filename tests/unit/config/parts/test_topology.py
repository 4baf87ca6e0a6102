"""Layouts that a U-net does not fit, and its cost."""

from __future__ import annotations

from typing import Any

import pytest

from ouroboros.config import ModelSpec
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.config.parts.topology import UNetSpec
from ouroboros.errors import OuroborosError


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        ("4", {"skips": -1}, "topology.skips must be >= 0 or null, got -1"),
        ("4", {"skips": 3}, "topology.skips is 3, but layout '4' has 2 pairs of visits to connect"),
        ("2 (4)x2 1", {"skips": 2}, "topology.skips is 2, but layout '2 .4.x2 1' has 1 pairs"),
        ("(2)x3", {}, "topology unet connects blocks outside of loops in pairs, and layout '.2.x3' has none: write"),
        ("1 (2)x3", {}, "has none"),
    ],
    ids=str,
)
def test_refused(layout: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OuroborosError, match=message) as caught:
        ModelSpec(layout=layout, topology=UNetSpec(**options))
    assert "\n" not in str(caught.value)


def test_a_stream_of_several_vectors_is_refused() -> None:
    with pytest.raises(OuroborosError, match="topology unet needs a residual whose stream is one vector"):
        ModelSpec(layout="4", topology=UNetSpec()).replace(residual=DeltaSpec(values=2))


@pytest.mark.parametrize(
    ("layout", "skips", "count"), [("4", None, 2), ("5", None, 2), ("2 (2)x9 3", None, 2), ("6", 1, 1), ("(1)x2", 0, 0)]
)
def test_cost(layout: str, skips: int | None, count: int) -> None:
    spec = UNetSpec(skips=skips)
    model = ModelSpec(layout=layout, hidden_size=8, topology=spec)
    assert spec.count(model) == count and spec.parameters(model) == 8 * count
    assert spec.flops(model, model.schedule) == 0 and spec.crossed(model) == set()
