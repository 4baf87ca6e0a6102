"""What mixers are given besides the stream and their memory.

Shapes: B batch, T new positions, S keys, H query heads.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MixerInput(NamedTuple):
    """What every visit's mixer is given besides the stream. Values, never stored on modules."""

    rotary: tuple[Tensor, Tensor]
    """Cosine and sine tables, each (B or 1, 1, T, n)."""
    mask: Tensor | None
    """(B, 1, T, S) boolean (True: attend) or additive; None: plain causal over T == S."""
    padding: Tensor | None
    """(B, T), 1 where the token is real; None when none is padding. For mixers that carry a state."""
    key_rotary: tuple[Tensor, Tensor] | None = None
    """Tables of all S keys, for mixers that rebuild keys from a cache; None: as ``rotary``."""
    positions: Tensor | None = None
    """(B or 1, T), how many real tokens, registers included, precede each; None: 0 to T - 1. For mixers that count."""
