"""Ranges and sizes of norms."""

from __future__ import annotations

import pytest

from ouroboros.config import BlockOverride, LayerNormSpec, ModelSpec, NormPart, RMSNormSpec
from ouroboros.errors import OuroborosError


@pytest.mark.parametrize(("cls", "parameters"), [(RMSNormSpec, 8), (LayerNormSpec, 16)])
def test_ranges_and_sizes(cls: type[NormPart], parameters: int) -> None:
    assert cls().parameters(8) == parameters  # pyrefly: ignore
    with pytest.raises(OuroborosError, match=r"norm\.eps must be > 0, got 0"):
        cls(eps=0)  # pyrefly: ignore


def test_the_depth_is_the_blocks_number_unless_it_is_given() -> None:
    override = BlockOverride(where="1", set={"norm.depth": 9})
    model = ModelSpec(layout="1 (2)x2 1", overrides=(override,)).replace(norm=RMSNormSpec(depth_scale=True))
    assert [block.norm.depth for block in model.blocks] == [1, 9, 3, 4]
    assert [block.norm.factor for block in model.blocks] == pytest.approx([1, 9**-0.5, 3**-0.5, 1 / 2])
    assert model.block.norm.final.factor == 1.0 and model.block.norm.replace(depth=9).final.factor == 1.0
    assert [block.norm.depth for block in ModelSpec(layout="2").blocks] == [None, None]
    with pytest.raises(OuroborosError, match="norm.depth must be >= 1 or null, got 0"):
        RMSNormSpec(depth_scale=True, depth=0)


def test_without_a_gain() -> None:
    assert RMSNormSpec(gain=False).parameters(8) == 0
