"""Rotary position embedding: the setting that every attention shares."""

from __future__ import annotations

from dataclasses import dataclass

from ouroboros.errors import check


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021, eq. 15), half-split layout as in Llama."""

    base: float = 10_000.0
    """Wavelength base theta."""
    fraction: float = 1.0
    """Share of each head's channels that is rotated; the rest passes through."""
    scale: float = 1.0
    """Positions are divided by this number before rotation."""

    def __post_init__(self) -> None:
        check(self.base > 1, f"rope.base must be > 1, got {self.base}")
        check(0 <= self.fraction <= 1, f"rope.fraction must be in [0, 1], got {self.fraction}")
        check(self.scale > 0, f"rope.scale must be > 0, got {self.scale}")
