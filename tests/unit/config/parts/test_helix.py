"""Layouts and heads that two streams do not fit, and their cost."""

from __future__ import annotations

from typing import Any

import pytest

from ouroboros.config import BlockOverride, ModelSpec
from ouroboros.config.parts.helix import CrossSpec, HelixSpec, SplitAttentionSpec
from ouroboros.errors import OuroborosError

ATTENTION = "1 up:1 down:1 second:1 1 up down second"
CROSS = tuple(BlockOverride(where=name, set={"mixer": "cross"}) for name in ("up", "down"))


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (HelixSpec, {"bridge_width": 0}, "topology.bridge_width must be >= 1, got 0"),
        (HelixSpec, {"merge_cap": 0}, "topology.merge_cap must be > 0 or null, got 0"),
        (HelixSpec, {"merge_cap": 1.5}, "topology.merge_cap must be <= 1 or null, got 1.5"),
        (HelixSpec, {"hint_cap": -1}, "topology.hint_cap must be > 0 or null, got -1"),
        (HelixSpec, {"skips": -1}, "topology.skips"),
        (CrossSpec, {"width": 0}, "mixer.width must be >= 1, got 0"),
        (SplitAttentionSpec, {"cross_heads": 0}, r"mixer.cross_heads must be in 1..mixer.num_heads \(4\), got 0"),
        (SplitAttentionSpec, {"cross_heads": 5}, "got 5"),
        (SplitAttentionSpec, {"num_heads": 8, "num_kv_heads": 4, "cross_heads": 3}, "leaves 5 query heads with 2 key"),
        (SplitAttentionSpec, {"num_kv_heads": 1}, "leaves 3 query heads with 1 key/value heads and 1 with 0"),
    ],
    ids=str,
)
def test_ranges(cls: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(OuroborosError, match=message):
        cls(**values)


@pytest.mark.parametrize(
    ("layout", "options", "overrides", "message"),
    [
        ("1 second:(1)x2 1", {}, (), "layout '1 second:.1.x2 1' has no segment 'second', the second stream's"),
        ("4", {}, (), "layout '4' has no segment 'second', the second stream's: write for example '1 second:1 1 sec"),
        ("1 second:1 1 second", {"stream": "third"}, (), "has no segment 'third'"),
        ("1 second:1 second", {}, (), "topology helix connects blocks outside of loops in pairs, and layout"),
        ("1 second:1 1", {"skips": 2}, (), "topology.skips is 2, but layout '1 second:1 1' has 1 pairs"),
        ("1 second:1 1", {"bridges": "attention"}, (), "segments 'up', 'down' must stand before each 'second'; see"),
        ("1 down:1 up:1 second:1 1", {"bridges": "attention"}, CROSS, "'up', 'down' must stand before each 'second'"),
        ("1 up:1 down:1 second:1 1 second", {"bridges": "attention"}, CROSS, "must stand before each 'second'"),
        (ATTENTION, {"bridges": "attention"}, (), "topology.bridges attention: 'up' needs --model.at.up.mixer cross"),
        (ATTENTION, {"bridges": "attention"}, CROSS[:1], "'down' needs --model.at.down.mixer cross"),
        (ATTENTION, {}, CROSS, "mixer 'cross' of block 1 looks at another stream, and topology 'helix' shows it none"),
    ],
    ids=str,
)
def test_refused(layout: str, options: dict[str, Any], overrides: tuple[BlockOverride, ...], message: str) -> None:
    with pytest.raises(OuroborosError, match=message) as caught:
        ModelSpec(layout=layout, topology=HelixSpec(**options), overrides=overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "added"),
    [
        ({}, 4 * 8 * 3),
        ({"skip_gate": True}, 4 * 8 * 3 + 8 + 1),
        ({"visit_embedding": "each"}, 4 * 8 * 3 + 2 * 8),
        ({"bridges": "attention"}, 0),
    ],
    ids=str,
)
def test_cost(options: dict[str, Any], added: int) -> None:
    """A skip, the merge gate, and what options add; every run of the second stream uses both bridges."""
    linear = options.get("bridges") != "attention"
    spec = HelixSpec(bridge_width=3, **options)
    layout, overrides = ("1 second:1 1 second", ()) if linear else (ATTENTION, CROSS)
    model = ModelSpec(layout=layout, hidden_size=8, topology=spec, overrides=overrides)
    assert spec.parameters(model) == 8 + 8 + added and spec.times(model.schedule) == 2
    assert spec.flops(model, model.schedule) == 2 * (8 * 8 * 3) * linear + 2 * 8 * spec.skip_gate
    assert spec.crossed(model) == ({1} if linear else {1, 2, 3})


@pytest.mark.parametrize(
    ("heads", "kv", "cross", "own"), [(4, 2, 2, 1), (8, 4, 2, 3), (4, 4, 1, 3), (4, 2, 4, 0), (8, 2, 6, 1)]
)
def test_key_value_heads_of_each_kind(heads: int, kv: int, cross: int, own: int) -> None:
    assert SplitAttentionSpec(num_heads=heads, num_kv_heads=kv, cross_heads=cross).own_kv_heads == own


def test_cost_of_attention_to_another_stream() -> None:
    cross = CrossSpec(width=3)
    assert cross.heads(8) == (1, 1, 3) and cross.cache_values(8) == 6
    assert cross.parameters(8) == 4 * 8 * 3 and cross.flops(8, 10, 2) == 2 * 4 * 8 * 3 + 4 * 12 * 3
