"""Ranges of the delta residual, and what its user should know."""

from __future__ import annotations

from typing import Any

import pytest

from ouroboros.config import BlockSpec, ModelSpec
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.errors import OuroborosError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"values": 0}, "residual.values must be >= 1, got 0"),
        ({"gate_hidden": 0}, "residual.gate_hidden"),
        ({"beta_init": 2.1}, r"residual.beta_init must be in \[0, 2\]"),
        ({"beta_init": -0.1}, r"residual.beta_init must be in \[0, 2\]"),
        ({"eps": 0}, "residual.eps"),
        ({"value_scale": 0}, "residual.value_scale"),
        ({"values": 5}, "leaves value channels unread"),
        ({"compressor": "token"}, "set residual.values to more than 1"),
        ({"embedding_conv": True}, "set residual.values to more than 1"),
    ],
    ids=str,
)
def test_ranges(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OuroborosError, match=message) as caught:
        DeltaSpec(**values)
    assert "\n" not in str(caught.value)


def test_outputs_that_start_at_zero_are_refused() -> None:
    with pytest.raises(OuroborosError, match="delta residual's direction"):
        ModelSpec(zero_init_outputs=True, block=BlockSpec(residual=DeltaSpec()))


def test_gates_that_start_where_they_hardly_learn_are_told() -> None:
    for start, frozen in ((0, True), (0.01, False), (1, False), (1.99, False), (2, True)):
        spec = DeltaSpec(beta_init=start)
        assert spec.frozen_gate == frozen
        warnings = ModelSpec().replace(residual=spec).warnings()
        assert [text[: len("residual.beta_init")] for text in warnings] == ["residual.beta_init"] * frozen


def test_form_of_the_stream() -> None:
    assert (DeltaSpec().channels, DeltaSpec().expanded) == (1, False)
    assert (DeltaSpec(values=4).channels, DeltaSpec(values=4).expanded) == (4, True)
