"""Which layers stay, and what is refused."""

from __future__ import annotations

import pytest

from ouroboros.config import ModelSpec
from ouroboros.errors import OuroborosError
from ouroboros.systems.controller.published import Published


def test_published_split() -> None:
    donor = ModelSpec(layout="36")
    settings = Published()
    assert settings.sources(donor) == [*range(8), 18, *range(28, 36)]
    assert settings.removed(donor) == [*range(8, 18), *range(19, 28)]
    assert settings.model(donor).layout == "8 loop:(1)x8 8"


def test_static_diagonals_stand_in_the_controllers_place() -> None:
    model = Published(static_rows=5).model(ModelSpec(layout="36"))
    assert [part.kind for part in model.loop] == ["static_diagonals", "norm", "gate"]


def test_a_looped_layer_within_the_coda_is_refused() -> None:
    """The published default on a model of 24 layers."""
    with pytest.raises(OuroborosError, match=r"looped layer 18 is not between prelude .* and coda \(from 16 of 24"):
        Published().model(ModelSpec(layout="24"))


def test_other_blocks_are_refused() -> None:
    donor = ModelSpec(layout="36")
    ffn = type(donor.block.ffn)(kind="gelu")
    with pytest.raises(OuroborosError, match="only attention with swiglu or geglu can be modulated"):
        Published().model(donor.replace(ffn=ffn))
