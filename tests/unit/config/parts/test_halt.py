"""What halting costs."""

from __future__ import annotations

import pytest

from ouroboros.config.parts.halt import HaltSpec
from ouroboros.errors import OuroborosError


def test_published_counts() -> None:
    """Section 3 of the specification: Qwen2.5-3B, and a model of 135 million parameters."""
    assert HaltSpec().parameters(2048, loops=64) == 590_593
    assert HaltSpec().parameters(576, loops=64) == 213_761


def test_ranges() -> None:
    with pytest.raises(OuroborosError, match="loop.halt.hidden must be >= 1, got 0"):
        HaltSpec(hidden=0)
