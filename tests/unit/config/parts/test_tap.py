"""Which blocks are tapped, and where there are none."""

from __future__ import annotations

from typing import Any

import pytest

from ouroboros.config import ModelSpec
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.config.parts.tap import TapSpec
from ouroboros.errors import OuroborosError


@pytest.mark.parametrize(
    ("layout", "spec", "blocks"),
    [
        ("3 (1)x2 1", TapSpec(), [(0, 1, 2)]),
        ("3 (1)x2 1", TapSpec(layers="first"), [(0,)]),
        ("3 (1)x2 1", TapSpec(layers="deepest"), [(2,)]),
        ("3 (1)x2 1", TapSpec(blocks=(1, 0)), [(1, 0)]),
        ("1 (1)x2 1 (1)x2", TapSpec(), [(0,), (0, 1, 2)]),
        ("1 (1)x2 1 (1)x2", TapSpec(blocks=(0,)), [(0,), (0,)]),
    ],
    ids=str,
)
def test_blocks_before_the_loop(layout: str, spec: TapSpec, blocks: list[tuple[int, ...]]) -> None:
    model = ModelSpec(layout=layout, loop=(spec,))
    assert [part.watches for (part,) in model.loop_parts] == blocks
    assert spec.watches == (spec.blocks or ())


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        ("(1)x2 1", {}, "loop.tap needs blocks before every loop .here 0 of them"),
        ("(1)x2 1 (1)x2", {}, "here 0 of them"),
        ("2 (1)x2", {"blocks": (2,)}, r"here 2 of them, numbered from 0\): write the layout for example"),
        ("2 (1)x2", {"blocks": (-1,)}, "loop.tap needs blocks before every loop"),
        ("2 (1)x2", {"blocks": ()}, "loop.tap needs blocks before every loop"),
    ],
    ids=str,
)
def test_refused(layout: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OuroborosError, match=message):
        ModelSpec(layout=layout, loop=(TapSpec(**options),))


def test_refused_by_itself_and_with_several_streams() -> None:
    with pytest.raises(OuroborosError, match="loop.tap.width must be >= 1, got 0"):
        TapSpec(width=0)
    with pytest.raises(OuroborosError, match="loop.tap needs a residual whose stream is one vector"):
        ModelSpec(layout="1 (1)x2", loop=(TapSpec(),)).replace(residual=DeltaSpec(values=2))


@pytest.mark.parametrize(("per_loop", "maps"), [(True, 2), (False, 1)])
def test_cost(per_loop: bool, maps: int) -> None:
    """Two blocks of three numbers each; every loop uses one map to the stream, and all share those from the blocks."""
    part = TapSpec(width=3, per_loop=per_loop, blocks=(0, 1))
    assert part.parameters(8, loops=2) == 2 * 3 * 8 + maps * 8 * 6
    assert part.flops(8, loops=2) == 2 * (2 * 3 * 8 + 2 * 8 * 6)
