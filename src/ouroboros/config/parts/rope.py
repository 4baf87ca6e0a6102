"""Rotary position embedding: the setting that every attention shares."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from ouroboros.config.needs import needs, untried
from ouroboros.errors import check


def _slows(value: float) -> bool:
    """a number other than 1"""
    return value != 1


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021, eq. 15), half-split layout as in Llama."""

    base: float = 10_000.0
    """Wavelength base theta."""
    fraction: float = 1.0
    """Share of each head's channels that is rotated; the rest passes through."""
    scale: float = 1.0
    """Positions are divided by this number before rotation."""
    loop_scales: tuple[float, ...] = ()
    """What positions are divided by besides, for each use of the block; later uses take the last one. With ``9 1`` a
    block sees positions nine times closer together when it is used first."""
    original_context: int | None = None
    """Context in tokens that ``base`` is meant for: a model of a longer one multiplies it by their ratio to the power
    n / (n - 2) for n rotated channels (NTK-aware scaling); None leaves ``base`` as it is."""

    slowing: float = field(
        default=1.0, metadata=untried("changes slow rotations alone, which a short text hardly shows")
    )
    """Slow rotations, whose wavelength is longer than ``slowing_context / slowing_low`` tokens, are slower by this
    factor. Those shorter than ``slowing_context / slowing_high`` stay, and between them the change is gradual (the
    scaling of Llama 3.1)."""
    slowing_context: int = field(default=8192, metadata=needs("slowing", _slows))
    """Context in tokens that the rotations were first meant for."""
    slowing_low: float = field(default=1.0, metadata=needs("slowing", _slows))
    """See ``slowing``."""
    slowing_high: float = field(default=4.0, metadata=needs("slowing", _slows))
    """See ``slowing``; greater than ``slowing_low``."""

    def __post_init__(self) -> None:
        check(self.base > 1, f"rope.base must be > 1, got {self.base}")
        check(0 <= self.fraction <= 1, f"rope.fraction must be in [0, 1], got {self.fraction}")
        check(self.scale > 0, f"rope.scale must be > 0, got {self.scale}")
        check(all(s > 0 for s in self.loop_scales), f"rope.loop_scales must be > 0, got {self.loop_scales}")
        check(self.slowing > 0, f"rope.slowing must be > 0, got {self.slowing}")
        check(self.slowing_context >= 1, f"rope.slowing_context must be >= 1, got {self.slowing_context}")
        check(
            0 < self.slowing_low < self.slowing_high,
            f"rope.slowing_low ({self.slowing_low}) must be > 0 and < rope.slowing_high ({self.slowing_high})",
        )
        known = self.original_context is None or self.original_context >= 1
        check(known, f"rope.original_context must be >= 1 or null, got {self.original_context}")

    def rotated(self, channels: int) -> int:
        """Channels that are rotated, of as many per head."""
        return int(channels * self.fraction + 1e-9) // 2 * 2  # a share is rarely exact

    def by_use(self, channels: int, context: int) -> tuple[RopeSpec, ...]:
        """The plain rotation for each use of a block, in a model of ``context`` tokens."""
        n, base = self.rotated(channels), self.base
        if self.original_context is not None and context > self.original_context and n > 2:
            base *= (context / self.original_context) ** (n / (n - 2))
        scales = [self.scale * scale for scale in self.loop_scales or (1.0,)]
        plain = dataclasses.replace(self, base=base, loop_scales=(), original_context=None)
        return tuple(dataclasses.replace(plain, scale=scale) for scale in scales)
