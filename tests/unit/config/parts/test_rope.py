"""Ranges of rotary embedding."""

from __future__ import annotations

from typing import Any

import pytest

from ouroboros.config import RopeSpec
from ouroboros.errors import OuroborosError


@pytest.mark.parametrize(
    ("values", "message"),
    [({"base": 1}, "rope.base"), ({"fraction": 1.1}, "rope.fraction"), ({"scale": 0}, "rope.scale")],
)
def test_ranges(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OuroborosError, match=message):
        RopeSpec(**values)
