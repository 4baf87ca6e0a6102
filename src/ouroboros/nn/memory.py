"""What a visit remembers: the seam between mixers and caches.

A mixer is handed a :class:`Memory` for its slot and asks it to extend keys and values; where they are kept (a growing
cache, a preallocated one, nowhere) and what precedes them (registers) is not the mixer's business.
Shapes: B batch, K key/value heads, R registers, S keys, C channels per head.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Memory(Protocol):
    """Past keys and values of one visit."""

    def extend(self, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        """Add T new keys and values; return all that the new queries may attend to, (B, K, S, C) each."""
        ...

    def recent(self, name: str, x: Tensor, count: int) -> Tensor:
        """``x`` (B, T, ...) behind the ``count`` entries that came before it under ``name``, zeros where there were none.

        The last ``count`` of the result are remembered. For causal filters over tokens.
        """
        ...


def with_recent(memory: Memory | None, name: str, x: Tensor, count: int) -> Tensor:
    """:meth:`Memory.recent`, or zeros in front without a memory."""
    if count == 0:
        return x
    if memory is not None:
        return memory.recent(name, x, count)
    return torch.cat((x.new_zeros(x.shape[0], count, *x.shape[2:]), x), dim=1)


class Recorder:
    """Keeps the keys and values it is given: how registers become a constant prefix."""

    def __init__(self) -> None:
        self.prefix: tuple[Tensor, Tensor] | None = None

    def extend(self, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        """Record and return them unchanged."""
        self.prefix = (k_BKTC, v_BKTC)
        return k_BKTC, v_BKTC


class Prefixed:
    """Register keys and values in front of another memory (or of none)."""

    def __init__(self, prefix: tuple[Tensor, Tensor], rest: Memory | None) -> None:
        self.prefix = prefix
        self.rest = rest

    def extend(self, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        """Extend the rest, then put the R constant entries in front."""
        if self.rest is not None:
            k_BKTC, v_BKTC = self.rest.extend(k_BKTC, v_BKTC)
        batch = k_BKTC.shape[0]
        k_prefix, v_prefix = (t.to(k_BKTC.dtype).expand(batch, -1, -1, -1) for t in self.prefix)
        return torch.cat((k_prefix, k_BKTC), dim=2), torch.cat((v_prefix, v_BKTC), dim=2)
