"""Ranges of the mixers' options; those of attention are tested with the model's."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ouroboros.config import ModelSpec, OsamSpec, from_dict, to_dict
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
)
def test_osam_out_of_range(option: dict[str, Any], words: str) -> None:
    with pytest.raises(OuroborosError, match=words):
        OsamSpec(**option)


def test_osam_in_a_file() -> None:
    spec = ModelSpec(mixer=OsamSpec(buckets=3, decay=True, time_scales=(2.0, 9.0)))
    assert from_dict(ModelSpec, to_dict(spec), where="model") == spec
    assert to_dict(spec)["mixer"]["kind"] == "osam"


def test_groups_of_coordinates_are_equal() -> None:
    ModelSpec(hidden_size=12, mixer=OsamSpec(frequencies=4))
    with pytest.raises(OuroborosError, match="mixer.frequencies"):
        ModelSpec(hidden_size=12, mixer=OsamSpec(frequencies=5))


def test_osam_defaults_are_the_published_ones() -> None:
    published = {"buckets": 2048, "readout_hidden": 128, "kupdate": 1, "value_path": True, "freeze_phase": False}
    published |= {"detach_state": True, "independent_hashes": False, "sketch_values": True, "frequencies": 1}
    published |= {
        "decay": False,
        "normalisation": "count",
        "gate_cap": 0.25,
        "gate_start": -2.5,
        "hash_seed": 42,
        "dropout": 0.0,
    }
    published |= {"time_scales": (4.0, 4096.0)}  # used by nothing in it
    assert dataclasses.asdict(OsamSpec()) == {"kind": "osam", "freq_cache": False, **published}


def test_registers_that_could_not_be_trained_are_refused() -> None:
    ModelSpec(registers=2, mixer=OsamSpec(detach_state=False))
    with pytest.raises(OuroborosError, match=r"registers reach the text .* mixer\.detach_state"):
        ModelSpec(registers=2, mixer=OsamSpec())
