"""What a visit remembers: the seam between mixers and caches.

A mixer is handed a :class:`Memory` for its slot and asks it to extend keys and values, or to carry a state of constant
size, and filters over tokens ask it for what came just before; where that is kept (a growing cache, a preallocated one,
nowhere) and what precedes it (registers) is not their business.
Shapes: B batch, T new tokens, K key/value heads, R registers, S keys, C channels per head.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Memory(abc.ABC):
    """Past keys and values of one visit, or its state, and what its filters over tokens saw last."""

    keeps: bool = True
    """Whether what it is given is kept for a later call; if not, a state need not be worked out to its end."""

    @abc.abstractmethod
    def extend(self, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        """Add T new keys and values; return all that the new queries may attend to, (B, K, S, C) each."""

    @abc.abstractmethod
    def state(self) -> Tensor | None:
        """What :meth:`carry` was given last, (B or 1, ...); None before the first token."""

    @abc.abstractmethod
    def carry(self, state: Tensor, new_tokens: int) -> None:
        """Replace the state by the one behind ``new_tokens`` more tokens, (B, ...)."""

    @abc.abstractmethod
    def last(self, name: str) -> Tensor | None:
        """What :meth:`remember` was given last under ``name``; None before the first time."""

    @abc.abstractmethod
    def remember(self, name: str, x: Tensor) -> None:
        """Keep ``x`` (B, count, ...) under ``name``."""

    def recent(self, name: str, x: Tensor, count: int) -> Tensor:
        """``x`` (B, T, ...) behind the ``count`` entries that came before it under ``name``; zeros where none were.

        The last ``count`` of the result are remembered. For causal filters over tokens: every use has its own name, and
        one ``count``. Padded entries of ``x`` are 0.
        """
        longer = self._behind(self.last(name), x, count)
        self.remember(name, longer[:, -count:])
        return longer

    def _behind(self, past: Tensor | None, x: Tensor, count: int) -> Tensor:
        return behind(past, x, count)


def with_recent(memory: Memory | None, name: str, x: Tensor, count: int) -> Tensor:
    """:meth:`Memory.recent`, or zeros in front without a memory."""
    if count == 0:
        return x
    if memory is not None:
        return memory.recent(name, x, count)
    return behind(None, x, count)


def behind(past: Tensor | None, x: Tensor, count: int, leading_B: Tensor | None = None) -> Tensor:
    """``x`` (B, T, ...) behind the ``count`` entries of ``past``: (B, count + T, ...) in the dtype of ``x``.

    Args:
        past: (B or 1, count, ...); None means zeros.
        x: new entries, 0 where padded.
        count: entries of ``past``.
        leading_B: how many of the first new entries are padding that no real one precedes. ``past`` then moves behind
            them, next to the first real entry, where it is without padding.
    """
    shape = (x.shape[0], count, *x.shape[2:])
    past = x.new_zeros(shape) if past is None else past.to(x.dtype).expand(shape)
    longer = torch.cat((past, x), dim=1)
    if leading_B is None:
        return longer
    at = torch.arange(longer.shape[1], device=x.device) - leading_B[:, None]
    at = at.expand(x.shape[0], -1)
    moved = past[torch.arange(x.shape[0], device=x.device)[:, None], at.clamp(0, count - 1)]
    rest = (...,) + (None,) * (x.ndim - 2)
    return torch.where((at < count)[rest], moved * (at >= 0)[rest], longer)


class Prefix(NamedTuple):
    """What a visit remembers of the registers."""

    keys: Tensor | None
    """(1, K, R, C); None of a mixer with a state."""
    values: Tensor | None
    """(1, K, R, C); None of a mixer with a state."""
    state: Tensor | None
    """(1, ...); None of a mixer with keys and values."""
    ends: dict[str, Tensor]
    """For each filter over tokens the last entries it saw, (1, count, ...)."""


class Recorder(Memory):
    """Keeps the keys and values it is given, and the ends of what filters saw: registers become a constant prefix."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.end_state: Tensor | None = None
        self.ends: dict[str, Tensor] = {}

    def extend(self, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        self.keys, self.values = k_BKTC, v_BKTC
        return k_BKTC, v_BKTC

    def state(self) -> None:
        """None: nothing precedes what is recorded."""

    def carry(self, state: Tensor, new_tokens: int) -> None:
        self.end_state = state

    def last(self, name: str) -> None:
        """None: nothing precedes what is recorded."""

    def remember(self, name: str, x: Tensor) -> None:
        self.ends[name] = x

    def recorded(self) -> Prefix:
        """All of it, once a mixer has run."""
        return Prefix(self.keys, self.values, self.end_state, self.ends)


class Prefixed(Memory):
    """Registers in front of another memory (or of none).

    Args:
        prefix: what they left at this visit.
        rest: remembers the text.
        leading_B: how many of this call's first positions are padding that no text precedes; None means none.
    """

    def __init__(self, prefix: Prefix, rest: Memory | None, leading_B: Tensor | None = None) -> None:
        self.prefix, self.rest, self.leading_B = prefix, rest, leading_B
        self.keeps = rest is not None and rest.keeps

    def extend(self, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        """Extend the rest, then put the R constant entries in front."""
        if self.rest is not None:
            k_BKTC, v_BKTC = self.rest.extend(k_BKTC, v_BKTC)
        batch = k_BKTC.shape[0]
        assert self.prefix.keys is not None and self.prefix.values is not None
        k_prefix = self.prefix.keys.to(k_BKTC.dtype).expand(batch, -1, -1, -1)
        v_prefix = self.prefix.values.to(v_BKTC.dtype).expand(batch, -1, -1, -1)
        return torch.cat((k_prefix, k_BKTC), dim=2), torch.cat((v_prefix, v_BKTC), dim=2)

    def state(self) -> Tensor | None:
        """Before any text the registers' state, afterwards what the rest carries."""
        carried = None if self.rest is None else self.rest.state()
        return self.prefix.state if carried is None else carried

    def carry(self, state: Tensor, new_tokens: int) -> None:
        if self.rest is not None:
            self.rest.carry(state, new_tokens)

    def last(self, name: str) -> Tensor | None:
        """Before any text the registers' end, afterwards what the rest remembers."""
        past = None if self.rest is None else self.rest.last(name)
        return self.prefix.ends.get(name) if past is None else past

    def remember(self, name: str, x: Tensor) -> None:
        if self.rest is not None:
            self.rest.remember(name, x)

    def _behind(self, past: Tensor | None, x: Tensor, count: int) -> Tensor:
        return behind(past, x, count, self.leading_B)


Added = tuple[Tensor, Tensor]
"""Keys and values of the T new positions of a visit, (B, K, T, C) each."""


class Held(Memory):
    """In front of another memory (or of none): positions that stopped in an earlier loop keep the keys and values that
    they had there, so that every position of the text has an entry in every loop.

    Args:
        rest: remembers the text.
        before: what the visit of the same block in the loop before added; None in the first loop.
        fill: puts new entries (B, N, ...) of the positions that go on into a copy of those of all (B, T, ...).
        seen: how many of all keys a mask is made for; None: all.
    """

    def __init__(
        self,
        rest: Memory | None,
        before: Added | None,
        fill: Callable[[Tensor, Tensor], Tensor],
        seen: int | None = None,
    ) -> None:
        self.rest, self.before, self.fill, self.seen = rest, before, fill, seen
        self.keeps = rest is not None and rest.keeps
        self.added: Added | None = None
        """What this visit adds, once it has run."""

    def extend(self, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        """Extend the rest by the entries of all T positions."""
        if self.before is not None:
            k_BKTC, v_BKTC = (
                self.fill(old.transpose(1, 2), new.transpose(1, 2)).transpose(1, 2)
                for old, new in zip(self.before, (k_BKTC, v_BKTC), strict=True)
            )
        self.added = k_BKTC, v_BKTC
        keys, values = self.added if self.rest is None else self.rest.extend(k_BKTC, v_BKTC)
        return keys[:, :, : self.seen], values[:, :, : self.seen]

    def state(self) -> Tensor | None:
        return None if self.rest is None else self.rest.state()

    def carry(self, state: Tensor, new_tokens: int) -> None:
        if self.rest is not None:
            self.rest.carry(state, new_tokens)

    def last(self, name: str) -> Tensor | None:
        return None if self.rest is None else self.rest.last(name)

    def remember(self, name: str, x: Tensor) -> None:
        if self.rest is not None:
            self.rest.remember(name, x)

    def recent(self, name: str, x: Tensor, count: int) -> Tensor:
        return super().recent(name, x, count) if self.rest is None else self.rest.recent(name, x, count)
