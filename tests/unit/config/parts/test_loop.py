"""Ranges of loop parts, and which of their settings are neutral."""

from __future__ import annotations

from typing import Any

import pytest

from ouroboros.config import LoopPart, ModelSpec
from ouroboros.config.part import kinds
from ouroboros.config.parts.loop import (
    AnchorSpec,
    BridgeSpec,
    ContractiveStepSpec,
    FlowSpec,
    HyperSpec,
    InjectionSpec,
    LoopEmbeddingSpec,
    LoopGainSpec,
    LoopNormSpec,
    LoopSmearSpec,
    RecurrenceGateSpec,
    UpdateGateSpec,
)
from ouroboros.config.parts.tap import TapSpec
from ouroboros.errors import OuroborosError


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (ContractiveStepSpec, {"step": 1.5}, r"loop.contractive.* must be in \(0, 1\], got 1.5"),
        (ContractiveStepSpec, {"step": 0}, "loop.contractive"),
        (LoopNormSpec, {"rows": 0}, "loop.norm.rows must be >= 1, got 0"),
        (LoopEmbeddingSpec, {"rows": 0}, "loop.embedding.rows"),
        (FlowSpec, {"rank": 0}, "loop.flow.rank must be >= 1, got 0"),
        (AnchorSpec, {"width": 0}, "loop.anchor.width must be >= 1, got 0"),
        (HyperSpec, {"streams": 0}, "loop.hyper.streams must be >= 1, got 0"),
    ],
)
def test_ranges(cls: type[LoopPart], values: dict[str, Any], message: str) -> None:
    with pytest.raises(OuroborosError, match=message):
        cls(**values)


def test_neutral_settings() -> None:
    neutral = {kind: spec.neutral() for kind, spec in kinds(LoopPart).items() if spec.neutral()}
    assert neutral == {
        "inject": (InjectionSpec(mode="add"), InjectionSpec(mode="concat")),
        "flow": (FlowSpec(),),
        "embedding": (LoopEmbeddingSpec(),),
        "anchor": (AnchorSpec(),),
        "hyper": (HyperSpec(),),
        "tap": (TapSpec(),),
        "update_gate": (UpdateGateSpec(),),
        "gain": (LoopGainSpec(form="scalar"), LoopGainSpec(form="channel")),
        "contractive": (ContractiveStepSpec(step=1.0),),
        "bridge": (BridgeSpec(),),
    }


@pytest.mark.parametrize(("rows", "parameters"), [(None, 3 * 8), (5, 5 * 8)])
def test_tables_have_a_row_for_every_loop(rows: int | None, parameters: int) -> None:
    for spec in (LoopNormSpec(rows=rows), LoopEmbeddingSpec(rows=rows)):
        assert spec.parameters(8, 3) == parameters and spec.flops(8, 3) == 0


@pytest.mark.parametrize(
    ("spec", "parameters", "flops"),
    [
        (FlowSpec(rank=5), 4 * 5 * 8, 3 * 4 * 5 * 8),
        (LoopSmearSpec(), 8, 0),
        (AnchorSpec(width=5), 2 * 2 * 5 * 8, 2 * 4 * 5 * 8),
        (HyperSpec(streams=2), 3 * (6 * 16 + 6 + 8), 3 * 6 * 4 * 8),
        (LoopGainSpec(form="scalar"), 3, 0),
        (LoopGainSpec(form="channel"), 24, 0),
        (LoopGainSpec(form="rms"), 0, 0),
        (InjectionSpec(mode="concat"), 128, 3 * 256),
        (RecurrenceGateSpec(), 136, 3 * 256),
    ],
    ids=str,
)
def test_what_three_loops_cost(spec: LoopPart, parameters: int, flops: int) -> None:
    assert (spec.parameters(8, 3), spec.flops(8, 3)) == (parameters, flops)


def test_an_anchor_needs_a_second_loop() -> None:
    with pytest.raises(OuroborosError, match=r"loop.anchor .* every loop of layout '1 \(1\)x1 \(1\)x2' at least two"):
        ModelSpec(layout="1 (1)x1 (1)x2", loop=(AnchorSpec(),))


def test_the_usual_order() -> None:
    """The command line adds parts in the order of the registry."""
    order = ["flow", "inject", "embedding", "loop_smear", "anchor", "hyper", "norm", "gate", "gain", "contractive"]
    assert [kind for kind in kinds(LoopPart) if kind in order] == order
