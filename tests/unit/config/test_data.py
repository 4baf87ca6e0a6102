"""Ranges of the data specification."""

from __future__ import annotations

from typing import Any

import pytest

from ouroboros.config import DataSpec, FilterSpec
from ouroboros.errors import OuroborosError

BAD_VALUES: list[tuple[type, dict[str, Any], str]] = [
    (DataSpec, {"sources": ()}, "data.sources"),
    (DataSpec, {"sequence_length": 1}, "data.sequence_length"),
    (DataSpec, {"test_fraction": 0.5}, "data.test_fraction"),
    (DataSpec, {"max_bytes": 0}, "data.max_bytes"),
    (FilterSpec, {"min_letters": 2}, "data.filters.min_letters"),
    (FilterSpec, {"symbol_run": 0}, "data.filters.symbol_run"),
    (FilterSpec, {"min_characters": -1}, "data.filters.min_characters"),
]


@pytest.mark.parametrize(("cls", "values", "message"), BAD_VALUES, ids=lambda value: str(value)[:40])
def test_ranges(cls: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(OuroborosError, match=message) as caught:
        cls(**values)
    assert "\n" not in str(caught.value)
