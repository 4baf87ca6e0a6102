"""The chain: order of visits, loop boundaries, truncated backpropagation, probe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ouroboros.config import AttentionSpec, FeedForwardSpec, LoopSpec, ModelSpec
from ouroboros.model.topology import Chain
from ouroboros.nn.mixer import MixerInput
from ouroboros.schedule import Visit, parse

LAYOUTS = ["3", "(1)x3", "(2)x2", "1 (1)x2 1", "1 (1)x2 1 (2)x3 1", "(1)x2 (1)x4"]
GIVEN = MixerInput((torch.empty(0), torch.empty(0)), None, None)


class Recording(nn.Module):
    """A block that adds its own vector and notes the memory it is given."""

    def __init__(self, block: int, seen: list[tuple[int, Any]]) -> None:
        super().__init__()
        self.block, self.seen = block, seen
        self.shift = nn.Parameter(torch.full((4,), float(10**block)))

    def forward(self, x: Tensor, given: MixerInput, memory: Any) -> Tensor:
        assert given is GIVEN
        self.seen.append((self.block, memory))
        return 2 * x + self.shift


def recording(layout: str, **loop: Any) -> tuple[Chain, list[tuple[int, Any]]]:
    """A chain of recording blocks, and the list they write to."""
    spec = ModelSpec(
        layout=layout,
        hidden_size=4,
        mixer=AttentionSpec(num_heads=1),
        ffn=FeedForwardSpec(intermediate_size=4),
        loop=LoopSpec(**loop),
    )
    chain, seen = Chain(spec), []
    chain.layers = nn.ModuleList(Recording(block, seen) for block in range(len(chain.layers)))
    return chain, seen


def note(visit: Visit, last: bool) -> Any:
    """A memory that names its visit."""
    return visit, last


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loops", [None, 1, 5])
def test_order_of_visits(layout: str, loops: int | None) -> None:
    chain, seen = recording(layout)
    schedule = parse(layout)
    if loops is not None and schedule.is_looped:
        schedule = schedule.with_loops(loops)
    chain(torch.zeros(1, 1, 4), schedule, GIVEN, note)
    assert tuple(visit for _, (visit, _) in seen) == schedule.visits
    assert [block for block, _ in seen] == [visit.block for visit in schedule.visits]
    last = {visit.block: visit.slot for visit in schedule.visits}
    assert [flag for _, (_, flag) in seen] == [last[visit.block] == visit.slot for visit in schedule.visits]


def test_blocks_and_loop_parts_are_stored_once() -> None:
    chain = Chain(ModelSpec(layout="2 (2)x4 1 (1)x9", loop=LoopSpec(embedding=True)))
    assert len(chain.layers) == 6
    assert [part.embedding.shape[0] for part in chain.loops] == [4, 9]


def test_loop_parts_at_boundaries() -> None:
    """x0 is the state before the first loop, also in later loops; parts belong to their segment."""
    chain, _ = recording("1 (1)x2 (1)x2", inject="add", embedding=True, contractive=0.5)
    for index, part in enumerate(chain.loops):
        nn.init.constant_(part.inject_scale, 0.5 + index)
        part.embedding.data = torch.tensor([[1.0], [2.0]]).expand(2, 4) * (index + 1)
    state = 2 * torch.ones(1, 1, 4) + 1
    for index, shift in ((0, 10.0), (1, 100.0)):
        start = state
        for loop in range(2):
            entered = state + (0.5 + index) * start + (loop + 1) * (index + 1)
            state = 0.5 * state + 0.5 * (2 * entered + shift)
    torch.testing.assert_close(chain(torch.ones(1, 1, 4), parse("1 (1)x2 (1)x2"), GIVEN, note), state)


def gradients(layout: str, window: int | None) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of the input and of each block's vector."""
    chain, _ = recording(layout)
    x = torch.ones(1, 1, 4, requires_grad=True)
    chain(x, parse(layout), GIVEN, note, backprop_loops=window).sum().backward()
    return x.grad if x.grad is not None else torch.zeros(1), [block.shift.grad for block in chain.layers]


@pytest.mark.parametrize("window", [3, 4, 100])
def test_a_window_of_all_loops_is_full_backpropagation(window: int) -> None:
    full, cut = gradients("1 (1)x3 1", None), gradients("1 (1)x3 1", window)
    assert torch.equal(full[0], cut[0])
    assert all(torch.equal(a, b) for a, b in zip(full[1], cut[1], strict=True))  # pyrefly: ignore


def test_truncated_backpropagation_stops_before_the_window() -> None:
    # Each visit doubles the state, so the shift of the visit k visits before the end has gradient 2^k.
    _, (prelude, looped, coda) = gradients("1 (1)x3 1", None)
    assert (prelude[0], looped[0], coda[0]) == (16, 8 + 4 + 2, 1)  # pyrefly: ignore
    at_input, (prelude, looped, coda) = gradients("1 (1)x3 1", 2)
    assert prelude is None and torch.equal(at_input, torch.zeros(1))
    assert (looped[0], coda[0]) == (4 + 2, 1)  # pyrefly: ignore


def test_truncation_changes_no_value() -> None:
    chain, _ = recording("1 (1)x3 1")
    outputs = [
        chain(torch.ones(1, 1, 4), parse("1 (1)x3 1"), GIVEN, note, backprop_loops=window) for window in (None, 1, 2)
    ]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_probe_sees_every_loop_boundary() -> None:
    chain, _ = recording("1 (1)x2 1 (1)x3")
    seen: list[tuple[int, int, Tensor, Tensor]] = []
    output = chain(
        torch.ones(1, 1, 4), parse("1 (1)x2 1 (1)x3"), GIVEN, note, probe=lambda *boundary: seen.append(boundary)
    )
    assert [(segment, loop) for segment, loop, _, _ in seen] == [(1, 0), (1, 1), (3, 0), (3, 1), (3, 2)]
    for (segment, loop, before, after), block in zip(seen, (1, 1, 3, 3, 3), strict=True):
        torch.testing.assert_close(after, 2 * before + 10.0**block, msg=f"segment {segment}, loop {loop}")
    assert seen[1][2] is seen[0][3] and seen[-1][3] is output


def test_call_replaces_how_a_block_runs() -> None:
    chain, seen = recording("(2)x2")
    called: list[nn.Module] = []

    def call(block: nn.Module, *arguments: Any) -> Tensor:
        called.append(block)
        return block(*arguments)

    chain(torch.ones(1, 1, 4), parse("(2)x2"), GIVEN, note, call=call)
    assert called == [chain.layers[block] for block, _ in seen] and len(called) == 4
