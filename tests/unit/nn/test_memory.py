"""What a visit remembers: keys and values, a state, and the recent entries that filters over tokens need."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ouroboros.nn.memory import Held, Memory, Prefix, Prefixed, Recorder, behind, with_recent


class Growing(Memory):
    """Keeps everything, like a cache."""

    def __init__(self) -> None:
        self.k, self.v = torch.empty(2, 3, 0, 4), torch.empty(2, 3, 0, 4)
        self.entries: dict[str, Tensor] = {}
        self.kept: Tensor | None = None
        self.seen = 0

    def state(self) -> Tensor | None:
        return self.kept

    def carry(self, state: Tensor, new_tokens: int) -> None:
        self.kept, self.seen = state, self.seen + new_tokens

    def last(self, name: str) -> Tensor | None:
        return self.entries.get(name)

    def remember(self, name: str, x: Tensor) -> None:
        self.entries[name] = x

    def extend(self, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        self.k, self.v = torch.cat((self.k, k_BKTC), dim=2), torch.cat((self.v, v_BKTC), dim=2)
        return self.k, self.v


def test_recorder_returns_and_keeps() -> None:
    recorder = Recorder()
    assert recorder.recorded() == Prefix(None, None, None, {}) and recorder.keeps
    k, v = torch.randn(2, 1, 3, 5, 4)
    assert recorder.extend(k, v) == (k, v)
    state = torch.randn(1, 6, 7)
    assert recorder.state() is None
    recorder.carry(state, 5)
    assert recorder.state() is None  # nothing precedes what is recorded
    assert recorder.recorded() == Prefix(k, v, state, {})


def test_prefix_without_a_cache() -> None:
    k_prefix, v_prefix = torch.randn(2, 1, 3, 2, 4)
    k, v = torch.randn(2, 2, 3, 5, 4)
    keys, values = Prefixed(Prefix(k_prefix, v_prefix, None, {}), None).extend(k, v)
    assert keys.shape == values.shape == (2, 3, 7, 4)
    for row in range(2):
        assert torch.equal(keys[row], torch.cat((k_prefix[0], k[row]), dim=1))
        assert torch.equal(values[row], torch.cat((v_prefix[0], v[row]), dim=1))


def test_prefix_stays_in_front_of_a_growing_cache_and_out_of_it() -> None:
    rest, prefix = Growing(), tuple(torch.randn(2, 1, 3, 2, 4))
    memory = Prefixed(Prefix(prefix[0], prefix[1], None, {}), rest)
    k, v = torch.randn(2, 2, 3, 5, 4)
    memory.extend(k[:, :, :3], v[:, :, :3])
    keys, values = memory.extend(k[:, :, 3:], v[:, :, 3:])
    assert torch.equal(rest.k, k) and torch.equal(rest.v, v)
    assert torch.equal(keys[:, :, 2:], k) and torch.equal(values[:, :, 2:], v)
    assert torch.equal(keys[1, :, :2], prefix[0][0]) and torch.equal(values[1, :, :2], prefix[1][0])


def test_prefix_takes_the_dtype_of_what_follows() -> None:
    prefix = Prefix(torch.randn(1, 3, 2, 4), torch.randn(1, 3, 2, 4), None, {"n": torch.randn(1, 2, 5)})
    keys, _ = Prefixed(prefix, None).extend(*torch.randn(2, 1, 3, 1, 4, dtype=torch.bfloat16))
    assert keys.dtype == torch.bfloat16
    assert Prefixed(prefix, None).recent("n", torch.randn(1, 3, 5).bfloat16(), 2).dtype == torch.bfloat16


def test_the_registers_state_comes_before_any_text_and_never_again() -> None:
    front, state = torch.randn(1, 6, 7), torch.randn(3, 6, 7)
    rest = Growing()
    memory = Prefixed(Prefix(None, None, front, {}), rest)
    assert memory.keeps and memory.state() is front
    memory.carry(state, 4)
    assert memory.state() is state is rest.state() and rest.seen == 4
    alone = Prefixed(Prefix(None, None, front, {}), None)
    alone.carry(state, 4)
    assert not alone.keeps and alone.state() is front  # without a cache every call begins behind the registers


def test_a_memory_that_only_reads_says_so() -> None:
    class Reading(Growing):
        keeps = False

    prefix = Prefix(None, None, torch.zeros(1, 2, 1), {})
    assert not Prefixed(prefix, Reading()).keeps and Prefixed(prefix, Growing()).keeps


def registers(end: Tensor, count: int) -> Prefix:
    """What a visit remembers of registers whose filter saw ``end`` (R, ...)."""
    recorder = Recorder()
    recorder.extend(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
    recorder.recent("n", end[None], count)
    return recorder.recorded()


def in_chunks(memory: Memory, x: Tensor, count: int, sizes: list[int]) -> list[Tensor]:
    """Windows (B, count + 1, ...) that end in each position, with ``x`` fed in chunks."""
    windows, at = [], 0
    for size in sizes:
        part = x[:, at : at + size]
        longer = memory.recent("n", part, count)
        assert torch.equal(longer[:, count:], part)
        windows += [longer[:, i : i + count + 1] for i in range(part.shape[1])]
        at += size
    return windows


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(1, 4), st.integers(0, 3))
def test_windows_do_not_depend_on_chunks(sizes: list[int], count: int, R: int) -> None:
    T = sum(sizes)
    x, front = torch.randn(2, T, 3, 2), torch.randn(R, 3, 2)
    memory: Memory = Prefixed(registers(front, count), Growing()) if R else Growing()
    whole = torch.cat((torch.zeros(2, count, 3, 2), front.expand(2, -1, -1, -1), x), dim=1)
    for t, window in enumerate(in_chunks(memory, x, count, sizes)):
        assert torch.equal(window, whole[:, R + t : R + t + count + 1])


def test_names_are_apart() -> None:
    memory, x, y = Growing(), torch.randn(2, 1, 2, 3), torch.randn(2, 1, 2, 3)
    for t in range(2):
        a, b = memory.recent("a", x[t], 1), memory.recent("b", y[t], 2)
    assert torch.equal(a[:, 0], x[0, :, 1]) and torch.equal(b[:, :2], y[0])


def test_without_a_memory_zeros_precede() -> None:
    x = torch.randn(2, 3, 4)
    assert with_recent(None, "n", x, 0) is x and with_recent(Growing(), "n", x, 0) is x
    longer = with_recent(None, "n", x, 2)
    assert torch.equal(longer[:, 2:], x) and not longer[:, :2].any()
    assert torch.equal(Recorder().recent("n", x, 2), longer)


def test_prefix_without_a_cache_remembers_nothing() -> None:
    memory, x = Prefixed(registers(torch.ones(4, 5), 2), None), torch.zeros(3, 1, 5)
    for _ in range(2):
        assert memory.recent("n", x, 2)[:, :, 0].tolist() == [[1, 1, 0]] * 3


@pytest.mark.parametrize("pads", [0, 1, 2, 5])
def test_the_past_moves_behind_leading_padding(pads: int) -> None:
    """The first real entry has the same before it, however many padded positions are between."""
    past, x = torch.tensor([[7.0, 8.0, 9.0]]), torch.tensor([[0.0] * pads + [1.0, 2.0]])
    longer = behind(past, x, 3, torch.tensor([pads]))
    assert longer.tolist() == [[0.0] * pads + [7.0, 8.0, 9.0, 1.0, 2.0]]
    both = behind(past, x.expand(2, -1), 3, torch.tensor([0, pads]))
    assert both[0].tolist() == [7.0, 8.0, 9.0, *x[0].tolist()] and torch.equal(both[1:], longer)


@given(st.integers(0, 9), st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_leading_padding_over_several_chunks(pads: int, sizes: list[int]) -> None:
    T, count = sum(sizes), 2
    real = (torch.arange(T) >= pads)[None].float()
    x, rest, prefix = torch.arange(1.0, T + 1)[None] * real, Growing(), registers(torch.tensor([7.0, 8.0]), count)
    at = 0
    for size in sizes:
        chunk = slice(at, at + size)
        leading = (real.cumsum(1)[:, chunk] == 0).sum(1)
        longer = Prefixed(prefix, rest, leading).recent("n", x[:, chunk], count)
        for i in range(size):
            if at + i >= pads:
                expected = [7.0, 8.0, *x[0, pads : at + i + 1].tolist()][-3:]
                assert longer[0, i : i + 3].tolist() == expected
        at += size


class TestHeld:
    """Positions that stopped keep their keys and values; the rest is another memory's business."""

    def test_entries_of_all_positions_go_to_the_rest(self) -> None:
        rest, (k, v), (older, old) = Growing(), torch.randn(2, 2, 3, 4, 4), torch.randn(2, 2, 3, 4, 4)
        first = torch.tensor([True, False, False, True])[:, None, None]
        held = Held(rest, (older, old), lambda before, new: torch.where(first, new, before))
        keys, values = held.extend(k, v)
        for found, new, before in ((keys, k, older), (values, v, old)):
            assert torch.equal(found[:, :, [0, 3]], new[:, :, [0, 3]])
            assert torch.equal(found[:, :, [1, 2]], before[:, :, [1, 2]])
        assert torch.equal(rest.k, keys) and held.added is not None and torch.equal(held.added[1], values)

    def test_in_the_first_loop_all_are_new_and_masks_may_end_earlier(self) -> None:
        rest, (k, v) = Growing(), torch.randn(2, 2, 3, 4, 4)
        rest.extend(k, v)
        held = Held(rest, None, lambda before, new: before, seen=5)
        keys, values = held.extend(k, v)
        assert keys.shape[2] == values.shape[2] == 5 and held.added is not None and held.added[0] is k

    def test_states_and_filters_are_the_rest_s(self) -> None:
        rest, x = Growing(), torch.randn(2, 1, 3)
        held = Held(rest, None, lambda before, new: new)
        assert held.state() is None and held.last("name") is None and held.keeps
        held.carry(x, 1)
        assert held.state() is x and rest.seen == 1
        assert torch.equal(held.recent("name", x, 1), torch.cat((torch.zeros_like(x), x), dim=1))
        assert torch.equal(rest.entries["name"], x) and torch.equal(held.recent("name", x, 1)[:, :1], x)

    def test_without_a_rest_nothing_is_kept(self) -> None:
        held, x = Held(None, None, lambda before, new: new), torch.randn(2, 1, 3)
        held.carry(x, 1)
        assert torch.equal(held.recent("name", x, 1), torch.cat((torch.zeros_like(x), x), dim=1))
        assert held.state() is None and held.last("name") is None and not held.keeps
