"""Ranges of loop parts, and which of their settings are neutral."""

from __future__ import annotations

from typing import Any

import pytest

from ouroboros.config import LoopPart
from ouroboros.config.part import kinds
from ouroboros.config.parts.loop import ContractiveStepSpec, InjectionSpec, LoopEmbeddingSpec, LoopNormSpec
from ouroboros.errors import OuroborosError


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (ContractiveStepSpec, {"step": 1.5}, r"loop.contractive.* must be in \(0, 1\], got 1.5"),
        (ContractiveStepSpec, {"step": 0}, "loop.contractive"),
        (LoopNormSpec, {"rows": 0}, "loop.norm.rows must be >= 1, got 0"),
        (LoopEmbeddingSpec, {"rows": 0}, "loop.embedding.rows"),
    ],
)
def test_ranges(cls: type[LoopPart], values: dict[str, Any], message: str) -> None:
    with pytest.raises(OuroborosError, match=message):
        cls(**values)


def test_neutral_settings() -> None:
    neutral = {kind: spec.neutral() for kind, spec in kinds(LoopPart).items() if spec.neutral()}
    assert neutral == {
        "inject": (InjectionSpec(mode="add"), InjectionSpec(mode="concat")),
        "embedding": (LoopEmbeddingSpec(),),
        "contractive": (ContractiveStepSpec(step=1.0),),
    }


@pytest.mark.parametrize(("rows", "parameters"), [(None, 3 * 8), (5, 5 * 8)])
def test_tables_have_a_row_for_every_loop(rows: int | None, parameters: int) -> None:
    for spec in (LoopNormSpec(rows=rows), LoopEmbeddingSpec(rows=rows)):
        assert spec.parameters(8, 3) == parameters and spec.flops(8) == 0
