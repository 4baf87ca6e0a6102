"""What a visit is given besides the stream.

Shapes: B batch, T new positions, S keys, D model width, H query heads, K key/value heads, C channels per head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from ouroboros.nn.memory import Memory
from ouroboros.schedule import Visit

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
"""Queries (B, H, T, C), keys and values (B, K, S, C), mask and dropout to what all heads return, (B, H, T, C)."""


class VisitContext(NamedTuple):
    """Values that are made for one visit of a block and never stored on modules.

    A part that reads ``visit`` is compiled once for each visit; one that does not is compiled once for its block.
    """

    rotary: tuple[Tensor, Tensor]
    """Cosine and sine tables of this visit's rotary embedding, each (B or 1, 1, T, n)."""
    mask: Tensor | None = None
    """(B, 1, T, S) boolean (True: attend) or additive; None: plain causal over T == S."""
    padding: Tensor | None = None
    """(B, T), 1 where the token is real; None when none is padding. For mixers that carry a state."""
    key_rotary: tuple[Tensor, Tensor] | None = None
    """Tables of all S keys, for mixers that rebuild keys from a cache; None: as ``rotary``."""
    positions: Tensor | None = None
    """Number of real tokens, registers included, before each new token, (B or 1, T); None: 0 to T - 1."""
    memory: Memory | None = None
    """What this visit remembers of earlier calls; None without a cache or registers."""
    visit: Visit | None = None
    """Slot, block and loop."""
    last: bool = True
    """Whether it is the last visit of its block."""
    first: bool = False
    """Whether it is the first visit of all."""
    carried: dict[str, Tensor] | None = None
    """What parts hand to visits within a call, by name: ``x0`` is the stream at its start, others what stem parts look
    up or earlier visits make; (B, T, ...) each."""
    handed: Mapping[str, Tensor] = {}
    """What the loop parts of this loop hand to its visits, by name."""
    looped: Mapping[str, Tensor] = {}
    """What the loop parts of this loop carry from loop to loop, by name; for parts that hand something alone."""
    other: Tensor | None = None
    """The present state of another stream that the topology names, (B, T, D)."""
    attend: Attend | None = None
    """Another implementation of attention over keys and values than ours; given only to models that can do with it, see
    :attr:`~ouroboros.config.part.MixerPart.own_attention`."""
