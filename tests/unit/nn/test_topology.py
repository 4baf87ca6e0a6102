"""The chain as steps: visits in order, loops entered and left, what truncated backpropagation leaves out."""

from __future__ import annotations

import pytest
import torch

from ouroboros.config import ModelSpec
from ouroboros.config.part import build
from ouroboros.config.parts.topology import ChainSpec
from ouroboros.nn.topology import MAIN, EnterLoop, Event, LeaveLoop, RunBlock, Step
from ouroboros.schedule import Visit, parse

LAYOUTS = ["3", "(1)x3", "(2)x2", "1 (1)x2 1", "1 (1)x2 1 (2)x3 1", "(1)x2 (1)x4"]


def chain(layout: str, loops: int | None = None) -> list[Step]:
    schedule = parse(layout)
    schedule = schedule if loops is None or not schedule.is_looped else schedule.with_loops(loops)
    return list(build(ChainSpec(), ModelSpec(layout=layout)).steps(schedule))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loops", [None, 1, 5])
def test_order_of_visits(layout: str, loops: int | None) -> None:
    schedule = parse(layout)
    schedule = schedule if loops is None or not schedule.is_looped else schedule.with_loops(loops)
    visits = [step for step in chain(layout, loops) if isinstance(step, RunBlock)]
    assert tuple(step.visit for step in visits) == schedule.visits
    last = {visit.block: visit.slot for visit in schedule.visits}
    assert [step.last for step in visits] == [last[step.visit.block] == step.visit.slot for step in visits]


def test_loops_are_entered_and_left_with_what_is_left_of_them() -> None:
    assert chain("1 (1)x2 1 (2)x1") == [
        RunBlock(Visit(0, 0, 0), True),
        EnterLoop(1, 0, 0, 2),
        RunBlock(Visit(1, 1, 0), False, 2),
        LeaveLoop(1, 0, 0, 2),
        EnterLoop(1, 0, 1, 1),
        RunBlock(Visit(2, 1, 1), True, 1),
        LeaveLoop(1, 0, 1, 1),
        RunBlock(Visit(3, 2, 0), True),
        EnterLoop(3, 1, 0, 1),
        RunBlock(Visit(4, 3, 0), True),
        RunBlock(Visit(5, 4, 0), True),
        LeaveLoop(3, 1, 0, 1),
    ]


def test_events_of_several_streams() -> None:
    class Executor:
        def __init__(self) -> None:
            self.streams = {MAIN: torch.ones(2), "side": torch.full((2,), 3.0)}

    run = Executor()
    Event(lambda streams: streams.update({MAIN: streams[MAIN] + streams["side"]})).run(run)
    assert run.streams[MAIN].tolist() == [4.0, 4.0]
