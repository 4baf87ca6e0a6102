"""Ranges of the head."""

from __future__ import annotations

import pytest

from ouroboros.config.parts.head import LinearHeadSpec
from ouroboros.errors import OuroborosError


@pytest.mark.parametrize("cap", [0, -1.0])
def test_ranges(cap: float) -> None:
    with pytest.raises(OuroborosError, match=r"head\.logit_softcap must be > 0 or null, got"):
        LinearHeadSpec(logit_softcap=cap)
