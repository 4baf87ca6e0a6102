"""The schedule of visits: which weights run, in which order, how often.

Depth is a static list of :class:`Visit`. A short notation writes it:

=============  =======================================================
``12``         twelve blocks, each used once
``(1)x8``      one block, eight times
``8 (1)x8 8``  eight blocks (prelude), one block eight times, eight more (coda)
``(2)x3``      two blocks A B, visited A B A B A B
``3 w:(1)x2``  the loop is named ``w``, for options of its blocks alone
``a:2 3 a``    the blocks named ``a`` run again at the end, without their loop if they have one
=============  =======================================================

Parameters are a sum over blocks; arithmetic and cache are sums over visits (:mod:`ouroboros.accounting`).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace

from ouroboros.errors import OuroborosError

_NAME = r"[A-Za-z_][A-Za-z0-9_-]*"
_TOKEN = re.compile(rf"\s*({_NAME}:|(?<!\S)(?!x\d*(?:\s|$)){_NAME}|\(|\)|x|\d+|\S)")
"""A word by itself is a name; the ``x`` of a loop count is none."""
_MAX_VISITS = 100_000


@dataclass(frozen=True)
class Visit:
    """One application of one block."""

    slot: int
    """Position in the schedule: the cache entry this visit owns."""
    block: int
    """Which weights."""
    loop: int
    """How often these weights were used before."""


@dataclass(frozen=True)
class Segment:
    """A run of consecutive blocks, repeated ``loops`` times when ``looped``."""

    first_block: int
    num_blocks: int
    loops: int
    looped: bool
    name: str = ""
    """By which options of its blocks alone are given; empty for none."""
    again: bool = False
    """Whether these are the blocks of an earlier segment of this name, visited once more."""

    @property
    def blocks(self) -> range:
        return range(self.first_block, self.first_block + self.num_blocks)

    @property
    def notation(self) -> str:
        if self.again:
            return self.name
        blocks = f"({self.num_blocks})x{self.loops}" if self.looped else str(self.num_blocks)
        return f"{self.name}:{blocks}" if self.name else blocks


@dataclass(frozen=True)
class Schedule:
    """A parsed layout. Use :func:`parse` to make one."""

    segments: tuple[Segment, ...]

    @functools.cached_property
    def visits(self) -> tuple[Visit, ...]:
        """Every application of a block, in order."""
        out: list[Visit] = []
        used = [0] * self.num_blocks
        for segment in self.segments:
            for block in [*segment.blocks] * segment.loops:
                out.append(Visit(len(out), block, used[block]))
                used[block] += 1
        return tuple(out)

    @property
    def last_slots(self) -> frozenset[int]:
        """The slot of every block's last visit."""
        return frozenset({visit.block: visit.slot for visit in self.visits}.values())

    @property
    def stored(self) -> tuple[Segment, ...]:
        """The segments that bring blocks of their own."""
        return tuple(segment for segment in self.segments if not segment.again)

    @property
    def num_blocks(self) -> int:
        """Distinct blocks: what is stored."""
        return sum(segment.num_blocks for segment in self.stored)

    @property
    def num_visits(self) -> int:
        """Applications of blocks: what is computed and cached."""
        return sum(segment.num_blocks * segment.loops for segment in self.segments)

    @property
    def is_looped(self) -> bool:
        return any(segment.looped for segment in self.segments)

    @property
    def loops(self) -> int:
        """The largest loop count of any segment (1 for a plain stack)."""
        return max(segment.loops for segment in self.segments)

    @property
    def notation(self) -> str:
        return " ".join(segment.notation for segment in self.segments)

    def with_loops(self, loops: int) -> Schedule:
        """The same blocks with every looped segment repeated ``loops`` times.

        Raises:
            OuroborosError: ``loops`` < 1, or the layout has no looped segment.
        """
        if loops < 1:
            raise OuroborosError(f"loops must be >= 1, got {loops}")
        if not self.is_looped:
            raise OuroborosError(f"layout {self.notation!r} has no loop, so its loop count cannot be set to {loops}")
        return Schedule(tuple(replace(s, loops=loops if s.looped else 1) for s in self.segments))

    def blocks_at(self, where: str) -> range:
        """The blocks of the segment of this name, of a number (``3``) or of a range (``0-2``).

        Raises:
            OuroborosError: the layout has no such segment or block.
        """
        for segment in self.segments:
            if where and segment.name == where:
                return segment.blocks
        numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", where)
        if numbers is None:
            named = ", ".join(s.name for s in self.segments if s.name) or "none is named"
            raise OuroborosError(f"layout {self.notation!r} has no segment {where!r} ({named})")
        first, last = int(numbers[1]), int(numbers[2] or numbers[1])
        if not first <= last < self.num_blocks:
            raise OuroborosError(f"layout {self.notation!r} has blocks 0 to {self.num_blocks - 1}, not {where}")
        return range(first, last + 1)


@functools.lru_cache(maxsize=256)
def parse(layout: str) -> Schedule:
    """Parse schedule notation.

    Raises:
        OuroborosError: says what is wrong, at which column, and how to write it.
    """
    reader = _Reader(layout)
    if not reader.tokens:
        raise _error(layout, 1, "is empty; write for example '6' or '2 (2)x3 2'")
    segments: list[Segment] = []
    while reader.position < len(reader.tokens):
        text, column = reader.present
        named = {segment.name: segment for segment in segments if segment.name}
        if re.fullmatch(_NAME, text) and text != "x":
            if text not in named:
                raise _error(layout, column, f"no segment before it is named {text!r}; name one as in '{text}:2'")
            segments.append(replace(named[text], loops=1, looped=False, again=True))
            reader.position += 1
        else:
            name = text[:-1] if text.endswith(":") else ""
            if name in named:
                raise _error(layout, column, f"the name {name!r} is given twice")
            reader.position += bool(name)
            segments.append(reader.segment(sum(s.num_blocks for s in segments if not s.again), name))
        if sum(s.num_blocks * s.loops for s in segments) > _MAX_VISITS:
            raise _error(layout, column, f"has more than {_MAX_VISITS} visits")
    return Schedule(tuple(segments))


class _Reader:
    """Reads a layout word by word."""

    def __init__(self, layout: str) -> None:
        self.layout, self.position = layout, 0
        self.tokens = [(m.group(1), m.start(1) + 1) for m in _TOKEN.finditer(layout)]

    @property
    def present(self) -> tuple[str, int]:
        """The word at hand and its column."""
        return self.tokens[self.position] if self.position < len(self.tokens) else ("", len(self.layout) + 1)

    def take(self, expected: str, why: str) -> tuple[str, int]:
        text, column = self.present
        if not (text.isdigit() if expected == "number" else text == expected):
            wanted = "a number" if expected == "number" else repr(expected)
            raise _error(self.layout, column, f"expected {wanted} {why}, found {repr(text) if text else 'the end'}")
        self.position += 1
        return text, column

    def count(self, why: str) -> int:
        text, column = self.take("number", why)
        if int(text) < 1:
            raise _error(self.layout, column, f"the number {why} must be at least 1")
        return int(text)

    def segment(self, block: int, name: str) -> Segment:
        """The segment that begins here, with ``block`` as its first."""
        text, column = self.present
        if text == "(":
            self.position += 1
            inner, place = self.present
            if inner == "(":
                raise _error(self.layout, place, "loops cannot be nested; write one level, as in '2 (2)x3 2'")
            blocks = self.count("of blocks in a loop")
            self.take(")", "to close the loop")
            self.take("x", "and a loop count after ')', as in '(2)x3'")
            return Segment(block, blocks, self.count("of loops"), True, name)
        if text.isdigit():
            return Segment(block, self.count("of blocks"), 1, False, name)
        found = f"unexpected {text!r}" if text else "found the end behind a name"
        raise _error(self.layout, column, f"{found}; write for example '6' or '2 (2)x3 2'")


def _error(layout: str, column: int, what: str) -> OuroborosError:
    return OuroborosError(f"layout {layout!r}, column {column}: {what}")
