"""The schedule of visits: which weights run, in which order, how often.

Depth is a static list of :class:`Visit`. A short notation writes it:

=============  =======================================================
``12``         twelve blocks, each used once
``(1)x8``      one block, eight times
``8 (1)x8 8``  eight blocks (prelude), one block eight times, eight more (coda)
``(2)x3``      two blocks A B, visited A B A B A B
``3 w:(1)x2``  the loop is named ``w``, for options of its blocks alone
=============  =======================================================

Parameters are a sum over blocks; arithmetic and cache are sums over visits (:mod:`ouroboros.accounting`).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace

from ouroboros.errors import OuroborosError, check

_SEGMENT = re.compile(
    r"\s*(?:(?P<name>[A-Za-z_][A-Za-z0-9_-]*):\s*)?"
    r"(?:(?P<plain>[0-9]+)|\(\s*(?P<blocks>[0-9]+)\s*\)\s*x\s*(?P<loops>[0-9]+))"
)
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

    @property
    def blocks(self) -> range:
        return range(self.first_block, self.first_block + self.num_blocks)

    @property
    def notation(self) -> str:
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
        for segment in self.segments:
            for loop in range(segment.loops):
                first = len(out)
                out += [Visit(first + i, block, loop) for i, block in enumerate(segment.blocks)]
        return tuple(out)

    @property
    def num_blocks(self) -> int:
        """Distinct blocks: what is stored."""
        return sum(segment.num_blocks for segment in self.segments)

    @property
    def num_visits(self) -> int:
        """Applications of blocks: what is computed and cached."""
        return len(self.visits)

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
        check(loops >= 1, f"loops must be >= 1, got {loops}")
        no_loop = f"layout {self.notation!r} has no loop, so its loop count cannot be set to {loops}"
        check(self.is_looped, no_loop)
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
        fits = first <= last < self.num_blocks
        check(fits, f"layout {self.notation!r} has blocks 0 to {self.num_blocks - 1}, not {where}")
        return range(first, last + 1)


@functools.lru_cache(maxsize=256)
def parse(layout: str) -> Schedule:
    """Parse schedule notation.

    Raises:
        OuroborosError: says what is wrong, at which column, and how to write it.
    """
    segments: list[Segment] = []
    end, block, visits = 0, 0, 0
    while not segments or layout[end:].strip():
        column = len(layout) - len(layout[end:].lstrip()) + 1
        where = f"layout {layout!r}, column {column}"
        match = _SEGMENT.match(layout, end)
        if match is None:
            raise OuroborosError(
                f"{where}: expected a number of blocks or a loop, loops not nested;"
                " write for example '6', '2 (2)x3 2' or '2 middle:(2)x3 2'"
            )
        for group in ("plain", "blocks", "loops"):
            fits = match[group] is None or int(match[group]) >= 1
            check(fits, f"layout {layout!r}, column {match.start(group) + 1}: the number must be at least 1")
        name, end = match["name"] or "", match.end()
        check(not name or all(name != segment.name for segment in segments), f"{where}: {name!r} is given twice")
        looped = match["plain"] is None
        segment = Segment(block, int(match["plain"] or match["blocks"]), int(match["loops"] or 1), looped, name)
        segments.append(segment)
        block += segment.num_blocks
        visits += segment.num_blocks * segment.loops
        check(visits <= _MAX_VISITS, f"{where}: has more than {_MAX_VISITS} visits")
    return Schedule(tuple(segments))
