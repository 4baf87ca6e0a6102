"""Ranges and sizes of norms."""

from __future__ import annotations

import pytest

from ouroboros.config import LayerNormSpec, NormPart, RMSNormSpec
from ouroboros.errors import OuroborosError


@pytest.mark.parametrize(("cls", "parameters"), [(RMSNormSpec, 8), (LayerNormSpec, 16)])
def test_ranges_and_sizes(cls: type[NormPart], parameters: int) -> None:
    assert cls().parameters(8) == parameters  # pyrefly: ignore
    with pytest.raises(OuroborosError, match=r"norm\.eps must be > 0, got 0"):
        cls(eps=0)  # pyrefly: ignore
