"""Ranges of a memory of constant size, and what its user should know."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ouroboros.config import BlockSpec, ModelSpec
from ouroboros.config.parts.osam import OsamSpec
from ouroboros.errors import OuroborosError


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"buckets": 0}, r"mixer\.buckets must be >= 1, got 0"),
        ({"kupdate": 0}, r"mixer\.kupdate must be >= 1, got 0"),
        ({"readout_hidden": -1}, r"mixer\.readout_hidden must be >= 1, got -1"),
        ({"frequencies": 0}, r"mixer\.frequencies must be >= 1"),
        ({"gate_cap": 0.0}, r"mixer\.gate_cap must be > 0"),
        ({"gate_start": float("inf")}, r"mixer\.gate_start must be a finite number"),
        ({"time_scales": (1.0, 64.0)}, r"mixer\.time_scales must be two lengths .* got 1, 64"),
        ({"time_scales": (64.0, 4.0)}, r"mixer\.time_scales must be two lengths .* in order, got 64, 4"),
        ({"time_scales": (4.0, float("nan"))}, r"mixer\.time_scales must be two lengths"),
        ({"hash_seed": -1}, r"mixer\.hash_seed must be in"),
        ({"dropout": 1.0}, r"mixer\.dropout must be in \[0, 1\), got 1\.0"),
    ],
    ids=str,
)
def test_ranges(option: dict[str, Any], words: str) -> None:
    with pytest.raises(OuroborosError, match=words):
        OsamSpec(**option)


def test_groups_of_coordinates_are_equal() -> None:
    ModelSpec(hidden_size=12, block=BlockSpec(mixer=OsamSpec(frequencies=4)))
    with pytest.raises(OuroborosError, match=r"mixer\.frequencies \(5\) must divide hidden_size \(12\)"):
        ModelSpec(hidden_size=12, block=BlockSpec(mixer=OsamSpec(frequencies=5)))


def test_defaults_are_the_published_ones() -> None:
    published = {"buckets": 2048, "readout_hidden": 128, "kupdate": 1, "value_path": True, "freeze_phase": False}
    published |= {"detach_state": True, "independent_hashes": False, "sketch_values": True, "frequencies": 1}
    published |= {"decay": False, "normalisation": "count", "gate_cap": 0.25, "gate_start": -2.5, "hash_seed": 42}
    published |= {"dropout": 0.0, "time_scales": (4.0, 4096.0)}  # the scales are used by nothing in it
    assert dataclasses.asdict(OsamSpec()) == {"kind": "osam", **published}


def test_registers_that_could_not_be_trained_are_refused() -> None:
    ModelSpec(registers=2, block=BlockSpec(mixer=OsamSpec(detach_state=False)))
    with pytest.raises(OuroborosError, match=r"registers reach the text .* mixer\.detach_state"):
        ModelSpec(registers=2, block=BlockSpec(mixer=OsamSpec()))


@pytest.mark.parametrize(
    ("buckets", "independent", "told"), [(78, False, False), (79, False, True), (144, True, False)]
)
def test_buckets_that_nothing_reaches_are_told(buckets: int, independent: bool, told: bool) -> None:
    mixer = OsamSpec(buckets=buckets, independent_hashes=independent)
    warnings = ModelSpec(hidden_size=12, block=BlockSpec(mixer=mixer)).warnings()
    assert ["mixer.buckets is 79 and a width of 12 has 78 products" in text for text in warnings] == [True] * told


def test_what_is_never_trained_is_said() -> None:
    assert OsamSpec().freezes and OsamSpec(detach_state=False, freeze_phase=True).freezes
    assert not OsamSpec(detach_state=False).freezes
