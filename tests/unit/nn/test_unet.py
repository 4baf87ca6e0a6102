"""Skip connections: which visits are connected, and the arithmetic, with functions in place of blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ouroboros.config import ModelSpec
from ouroboros.config.part import build
from ouroboros.config.parts.topology import UNetSpec
from ouroboros.nn.topology import MAIN, RunBlock
from ouroboros.nn.unet import UNet

D = 4


class Executor:
    """Runs steps on streams; a block is a function of its number."""

    def __init__(self, x: Tensor) -> None:
        self.streams, self.order = {MAIN: x}, []

    def block(self, step: RunBlock) -> None:
        self.order.append(step.visit.slot)
        self.streams[step.stream] = run(step.visit.block, self.streams[step.stream])

    def enter(self, step: Any) -> None:
        """No loop parts."""

    leave = enter


def run(block: int, x: Tensor) -> Tensor:
    """What stands for a block."""
    return torch.sin((block + 1) * x) + x


def unet(layout: str, skips: int | None = None) -> UNet:
    topology = build(UNetSpec(skips=skips), ModelSpec(layout=layout, hidden_size=D, topology=UNetSpec(skips=skips)))
    torch.nn.init.normal_(topology.skips.weight)
    return topology


@pytest.mark.parametrize(
    ("layout", "skips", "pairs"),
    [
        ("4", None, {2: 1, 3: 0}),
        ("5", None, {2: 1, 3: 0}),  # the last of an odd number has none
        ("2 (1)x2 3", None, {4: 1, 5: 0}),
        ("1 (2)x2 1", None, {5: 0}),
        ("6", 1, {3: 2}),
        ("6", 2, {3: 2, 4: 1}),
        ("6", 0, {}),
        ("a:1 b:1 (1)x2 b a", None, {4: 1, 5: 0}),
    ],
    ids=str,
)
def test_early_visits_are_added_before_late_ones(layout: str, skips: int | None, pairs: dict[int, int]) -> None:
    """``pairs``: slot of a late visit to the early one that it takes the stream behind of."""
    topology, x = unet(layout, skips), torch.randn(2, 3, D, dtype=torch.float64)
    schedule = ModelSpec(layout=layout).schedule
    on = Executor(x)
    for step in topology.steps(schedule):
        step.run(on)
    behind: dict[int, Tensor] = {}
    weights = dict(zip(pairs, topology.skips.weight, strict=True))
    for visit in schedule.visits:
        x = x + weights[visit.slot] * behind[pairs[visit.slot]] if visit.slot in pairs else x
        behind[visit.slot] = x = run(visit.block, x)
    torch.testing.assert_close(on.streams.pop(MAIN), x)
    assert on.order == list(range(schedule.num_visits)) and on.streams == {}, "nothing is left over"


def test_other_loop_counts_connect_the_same_blocks() -> None:
    topology, schedule = unet("1 (1)x2 1"), ModelSpec(layout="1 (1)x2 1").schedule
    for loops in (1, 5):
        on = Executor(x := torch.randn(1, 2, D, dtype=torch.float64))
        for step in topology.steps(schedule.with_loops(loops)):
            step.run(on)
        first = y = run(0, x)
        for _ in range(loops):
            y = run(1, y)
        torch.testing.assert_close(on.streams[MAIN], run(2, y + topology.skips.weight[0] * first))


def test_factors_start_at_one() -> None:
    topology = unet("6")
    topology.skips.reset_parameters()
    assert torch.equal(topology.skips.weight, torch.ones(3, D))
    assert topology.spec.parameters(ModelSpec(layout="6", hidden_size=D)) == 3 * D
