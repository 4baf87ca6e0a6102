"""How visits are wired: a topology turns a schedule into steps; :mod:`ouroboros.model.executor` runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from ouroboros.config import ModelSpec
from ouroboros.config.parts.topology import ChainSpec
from ouroboros.schedule import Schedule, Segment, Visit

MAIN = "main"
"""The stream that begins as the embeddings and that the head reads."""


class RunBlock(NamedTuple):
    """A visit: the block reads and replaces a stream."""

    visit: Visit
    last: bool
    """Whether it is the last visit of its block."""
    left: int = 1
    """Loops of the segment from this one to the end, for truncated backpropagation."""
    stream: str = MAIN
    other: str | None = None
    """Another stream that the block may look at."""

    def run(self, on: Any) -> None:
        """Run on the executor."""
        on.block(self)


class _LoopBoundary(NamedTuple):
    """Where a loop begins or ends."""

    segment: int
    """Index among all segments."""
    looped: int
    """Index among the looped ones."""
    loop: int
    left: int
    """Loops of the segment from this one to the end."""
    stream: str = MAIN


class EnterLoop(_LoopBoundary):
    """The loop parts of a looped segment act on the state that enters a loop."""

    def run(self, on: Any) -> None:
        """Run on the executor."""
        on.enter(self)


class LeaveLoop(_LoopBoundary):
    """The loop parts act on the state that a loop has produced."""

    def run(self, on: Any) -> None:
        """Run on the executor."""
        on.leave(self)


class Event(NamedTuple):
    """Anything else: what is saved, merged or bridged between streams."""

    apply: Callable[[dict[str, Tensor]], None]
    """Changes the streams, tensors by name."""

    def run(self, on: Any) -> None:
        """Run on the executor."""
        self.apply(on.streams)


Step = RunBlock | EnterLoop | LeaveLoop | Event


def by_segment(schedule: Schedule) -> Iterator[tuple[Segment, list[Step]]]:
    """Every segment with its visits and, around each of its loops, the loop parts; all on the main stream."""
    visits, last = iter(schedule.visits), schedule.last_slots
    looped = 0
    for index, segment in enumerate(schedule.segments):
        steps: list[Step] = []
        for loop in range(segment.loops):
            left = segment.loops - loop
            inner = [RunBlock(visit, visit.slot in last, left) for _, visit in zip(segment.blocks, visits)]
            around = (index, looped, loop, left)
            steps += [EnterLoop(*around), *inner, LeaveLoop(*around)] if segment.looped else inner
        looped += segment.looped
        yield segment, steps


def segment_steps(schedule: Schedule) -> Iterator[Step]:
    """The steps of all segments one after the other: what most topologies are made of."""
    for _, steps in by_segment(schedule):
        yield from steps


class Chain(nn.Module):
    """Blocks one after the other; looped segments repeat, with loop parts at their boundaries."""

    def __init__(self, spec: ChainSpec, model: ModelSpec) -> None:
        super().__init__()

    def steps(self, schedule: Schedule) -> Iterator[Step]:
        """The visits in order, and what happens between them."""
        return segment_steps(schedule)
