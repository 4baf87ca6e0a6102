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

from ouroboros.errors import OuroborosError, check

_NAME = "[A-Za-z_][A-Za-z0-9_-]*"
_SEGMENT = re.compile(
    rf"\s*(?:(?P<again>(?!x[0-9]*(?!\S)){_NAME})(?!\S)|(?:(?P<name>{_NAME}):\s*)?"
    r"(?:(?P<plain>[0-9]+)|\(\s*(?P<blocks>[0-9]+)\s*\)\s*x\s*(?P<loops>[0-9]+)))"
)
_MAX_VISITS = 100_000
NEW = "new"
"""In a list of blocks, one that begins at its own start."""


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
            rest = layout[end:].split()
            found = f"unexpected {rest[0]!r}" if rest else "is empty"
            hint = "write blocks or a loop, not nested, as in '6', '2 (2)x3 2' or '2 middle:(2)x3 2'"
            raise OuroborosError(f"{where}: {found}; {hint}")
        for group, what in (("plain", "blocks"), ("blocks", "blocks"), ("loops", "loops")):
            fits = match[group] is None or int(match[group]) >= 1
            check(fits, f"layout {layout!r}, column {match.start(group) + 1}: the number of {what} must be at least 1")
        name, again, end = match["name"] or "", match["again"], match.end()
        named = {segment.name: segment for segment in segments if segment.name}
        check(name not in named, f"{where}: the name {name!r} is given twice")
        if again is not None:
            check(again in named, f"{where}: no segment before it is named {again!r}; name one as in '{again}:2'")
            segment = replace(named[again], loops=1, looped=False, again=True)
        else:
            blocks, loops = int(match["plain"] or match["blocks"]), int(match["loops"] or 1)
            segment = Segment(block, blocks, loops, match["plain"] is None, name)
            block += blocks
        segments.append(segment)
        visits += segment.num_blocks * segment.loops
        check(visits <= _MAX_VISITS, f"{where}: has more than {_MAX_VISITS} visits")
    return Schedule(tuple(segments))


def blocks_of(text: str, there: int, here: int, option: str, *, new: bool = False) -> list[int | None]:
    """The block of a source of ``there`` blocks that each of ``here`` blocks takes, by a list with ranges.

    Args:
        text: the list; with ``new``, ``new`` in it stands for a block that takes none.
        there: blocks of the source.
        here: blocks of the model.
        option: how messages name the list.
        new: whether blocks may take none.

    Raises:
        OuroborosError: it is no such list, names a block that is not there, or is of another length.

    >>> blocks_of("0-1,new,2", 3, 4, "--from-blocks", new=True)
    [0, 1, None, 2]
    """
    found: list[int | None] = []
    for item in text.split(","):
        if new and item.strip() == NEW:
            found.append(None)
            continue
        found.extend(numbers_of(item.strip(), there, option, more=f", and not {NEW!r}" * new))
    check(len(found) == here, f"{option}: {text!r} lists {len(found)} blocks, the model has {here}")
    return found


def numbers_of(text: str, there: int, option: str, *, more: str = "") -> range:
    """The blocks that ``7`` or ``3-5`` names, of a source of ``there`` blocks.

    Args:
        text: a number, or the first and the last.
        there: blocks of the source.
        option: how messages name what holds the text.
        more: what messages say of other forms.

    Raises:
        OuroborosError: it is no such text, or names a block that is not there.
    """
    first, _, last = text.partition("-")
    check(
        all(number.isascii() and number.isdigit() for number in (first, last or first)),
        f"{option}: {text!r} is no number of a block, no range such as 0-3{more}",
    )
    low, high = int(first), int(last or first)
    check(low <= high < there, f"{option}: {text!r} is not within 0-{there - 1}, the source's blocks")
    return range(low, high + 1)
