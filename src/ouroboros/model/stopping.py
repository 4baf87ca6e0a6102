"""Positions that stop before the last loop of a segment: what stays of them, and how their work is saved.

A position that a loop part has stopped is frozen. Its state stays as the loop left it, and in later loops every block
attends to the keys and values that it had in that loop, which a cache has as the entries of the later visits too. So a
cache stays rectangular, every position can attend to every earlier one in every loop, and no position depends on later
ones or on other sequences of the batch. A mixer with a state of constant size has no such entries: it reads the frozen
state instead.

All positions may be computed, and frozen ones set back: that is what training does, what is compiled, and what those
who watch are shown. Otherwise only those that go on are computed, each sequence filled up to the longest of its batch,
and nothing but cache entries are written once none is left. Both are one function. The second way needs blocks that
treat positions by themselves but for the keys and values that they extend.
Shapes: B batch, T positions, N positions of the sequence with most that go on, S keys.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ouroboros.accounting import recent_values
from ouroboros.config import ModelSpec
from ouroboros.nn.memory import Added, Held, Memory
from ouroboros.nn.part import LoopModule
from ouroboros.nn.topology import MAIN, EnterLoop, LeaveLoop, RunBlock, Step
from ouroboros.nn.visit import VisitContext


def separable(spec: ModelSpec, steps: Iterable[Step], watched: set[int]) -> set[int]:
    """The looped segments, by index, whose positions can be computed some at a time.

    Args:
        spec: the model.
        steps: of its topology.
        watched: blocks whose output loop parts read.
    """
    found, mixed, inside = set[int](), set[int](), None
    for step in steps:
        if isinstance(step, EnterLoop):
            inside = step.looped
            found.add(inside)
            if any(part.sees_later or part.recent_values(spec.hidden_size) for part in spec.loop_parts[inside]):
                mixed.add(inside)
        elif isinstance(step, LeaveLoop):
            inside = None
        elif inside is not None and not (isinstance(step, RunBlock) and _alone(step, spec, watched)):
            mixed.add(inside)
    return found - mixed


def _alone(step: RunBlock, spec: ModelSpec, watched: set[int]) -> bool:
    """Whether a visit treats positions by themselves but for keys and values."""
    block = step.visit.block
    keys = spec.blocks[block].mixer.keeps == "keys" and not recent_values(spec, block)
    return keys and step.other is None and step.stream == MAIN and block not in watched


class Going:
    """The positions that go on, (B, T) boolean; rows of those alone are filled up with others."""

    def __init__(self, going_BT: Tensor, at_BN: Tensor | None) -> None:
        self.going_BT, self.at_BN = going_BT, at_BN
        if at_BN is not None:
            self.valid_BN = going_BT.gather(1, at_BN)

    @classmethod
    def of(cls, going_BT: Tensor, *, narrows: bool) -> Going:
        """With ``narrows`` those alone are computed, if they are fewer than T in every sequence."""
        most = int(going_BT.sum(1).max()) if narrows else going_BT.shape[1]
        if most == going_BT.shape[1]:
            return cls(going_BT, None)
        first = (~going_BT).to(torch.uint8).argsort(dim=1, stable=True)  # those that go on, in order, then the others
        return cls(going_BT, first[:, :most])

    @property
    def none(self) -> bool:
        """Whether no position is known to go on."""
        return self.at_BN is not None and self.at_BN.shape[1] == 0

    def narrow(self, x: Tensor) -> Tensor:
        """(B or 1, T, ...) of all positions to (B, N, ...)."""
        if self.at_BN is None:
            return x
        rows = torch.arange(len(self.at_BN), device=x.device)[:, None]
        return x.expand(len(self.at_BN), *x.shape[1:])[rows, self.at_BN]

    def widen(self, old: Tensor, new: Tensor) -> Tensor:
        """``old`` (B, T, ...) with ``new`` (B, N, ...) for the positions that go on."""
        if self.at_BN is None:
            return torch.where(self.going_BT[(...,) + (None,) * (old.ndim - 2)], new, old)
        full = old.clone()
        full[self.going_BT] = new[self.valid_BN].to(full.dtype)
        return full

    def context(self, visit: VisitContext) -> VisitContext:
        """What a visit of these positions is given, of what one of all would be."""
        if self.at_BN is None:
            return visit
        mask = visit.mask
        if mask is None:  # plain causal over T == S
            keys = torch.arange(self.going_BT.shape[1], device=self.at_BN.device)
            mask = (keys <= self.at_BN[..., None])[:, None]
        else:
            mask = self.narrow(mask.transpose(1, 2)).transpose(1, 2)
        return visit._replace(
            rotary=self._rotary(visit.rotary),
            key_rotary=visit.rotary if visit.key_rotary is None else visit.key_rotary,
            mask=mask,
            padding=None if visit.padding is None else self.narrow(visit.padding),
            positions=None if visit.positions is None else self.narrow(visit.positions),
            carried=None if visit.carried is None else {n: self.narrow(x) for n, x in visit.carried.items()},
        )

    def _rotary(self, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        cos, sin = (self.narrow(table.transpose(1, 2)).transpose(1, 2) for table in tables)
        return cos, sin


class Stopping:
    """One looped segment, some of whose parts may stop positions.

    Args:
        spec: the model.
        narrows: whether positions that have stopped are left out; else they are computed and set back.
    """

    def __init__(self, spec: ModelSpec, *, narrows: bool) -> None:
        self.spec, self.narrows = spec, narrows
        self.going: Going | None = None
        """None while all positions go on."""
        self._all: tuple[Tensor, dict[str, Tensor]] | None = None
        """State and carried values of all positions, while some are computed alone."""
        self._added: dict[int, Added] = {}
        """What the last visit of each block added to its memory."""
        self._padding: Tensor | None = None

    @property
    def over(self) -> bool:
        """Whether no position goes on, so that nothing is left to compute."""
        return self.going is not None and self.going.none

    def begin(self, context: VisitContext) -> VisitContext:
        """What a visit is given."""
        self._padding = context.padding
        if context.visit is None or self.spec.blocks[context.visit.block].mixer.keeps != "keys":
            return context
        fill = _replace if self.going is None else self.going.widen
        given = context if self.going is None else self.going.context(context)
        # Without a mask a preallocated cache may return more keys than there are positions.
        seen = None if given.mask is None or context.mask is not None else given.mask.shape[-1]
        return given._replace(memory=Held(context.memory, self._added.get(context.visit.block), fill, seen))

    def end(self, context: VisitContext, x: Tensor, after: Tensor) -> Tensor:
        """The stream behind a visit, of ``x`` before it and what the block made."""
        held = context.memory
        if isinstance(held, Held) and held.added is not None and context.visit is not None:
            self._added[context.visit.block] = held.added
        return after if self.going is None or self.going.at_BN is not None else self.going.widen(x, after)

    def skip(self, memory: Memory | None, block: int) -> None:
        """A visit of no position: its cache entries are those of the loop before."""
        if memory is not None and memory.keeps:
            memory.extend(*self._added[block])

    def leave(
        self, before: Tensor, z: Tensor, carried: dict[str, Tensor], parts: Iterable[LoopModule], *, last: bool
    ) -> Tensor:
        """The state behind a loop, of all positions behind the last one.

        Args:
            before: the state that entered it.
            z: what the loop and its parts made.
            carried: by the parts; is changed in place.
            parts: of the segment.
            last: whether it is the segment's last loop.
        """
        if self.over and not last:
            return z
        alone = self.going is not None and self.going.at_BN is not None
        if self.going is not None and not alone:
            z = self.going.widen(before, z)
        going = None
        if not last:
            for part in (part for part in parts if part.stops):
                found = part.goes_on(carried)
                going = found if going is None else going & found
        if alone:
            z = self._widened(z, carried)
        if going is None or (self.going is None and self.narrows and bool(going.all())):
            return z
        if self.going is not None:
            going = self.going.widen(torch.zeros_like(self.going.going_BT), going)
        elif self.narrows and self._padding is not None:
            going = going & self._padding.bool()
        self.going = Going.of(going, narrows=self.narrows)
        if self.going.at_BN is not None:
            self._all = z, dict(carried)
            carried.update({name: self.going.narrow(x) for name, x in carried.items()})
            z = self.going.narrow(z)
        return z

    def _widened(self, z: Tensor, carried: dict[str, Tensor]) -> Tensor:
        """State and carried values of all positions again."""
        assert self.going is not None and self._all is not None
        state, kept = self._all
        carried.update({name: self.going.widen(kept[name], x) for name, x in carried.items()})
        return self.going.widen(state, z)


def _replace(old: Tensor, new: Tensor) -> Tensor:
    """While all positions go on, they all have new entries."""
    return new
