"""A memory that turns and fades, against the recurrence it stands for, one token after another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ouroboros.nn.linear_memory import Keys, Turn, phased, read_and_write, rotate_by

DOUBLE = torch.float64
B, D, E = 2, 3, 4


def step_by_step(
    q: Tensor, keys: Keys, v: Tensor, turn: Turn, state: Tensor | None, padding: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``S <- L (S + k v^T)`` in complex numbers, read before it is written."""
    rate = turn.decay_D if turn.decay_D is not None else torch.zeros_like(turn.frequency_D)
    factor = torch.exp(torch.complex(-rate, -turn.frequency_D))[None, :, None]
    S = torch.zeros(len(v), D, E + 1, dtype=torch.complex128)
    if state is not None:
        S = torch.complex(state[:, :D], state[:, D:]).expand(len(v), -1, -1)
    sums, reads = [], []
    for t in range(v.shape[1]):
        k = torch.polar(keys.size[:, t].abs(), keys.angle[:, t]) * keys.size[:, t].sign()
        sums.append(torch.stack((S[..., -1].real, S[..., -1].imag), dim=1))
        reads.append((torch.complex(q[:, t, 0], q[:, t, 1])[:, None] @ S[..., :-1]).real[:, 0])
        written = k[..., None] * torch.cat((v[:, t], torch.ones(len(v), 1, dtype=DOUBLE)), dim=-1)[:, None]
        new = factor * (S + written)
        S = new if padding is None else torch.where(padding[:, t, None, None] > 0, new, S)
    return torch.stack(sums, 1), torch.stack(reads, 1), torch.cat((S.real, S.imag), 1)


def inputs(T: int) -> tuple[Tensor, Keys, Tensor]:
    q = torch.randn(B, T, 2, D, dtype=DOUBLE)
    return q, Keys(*torch.randn(2, B, T, D, dtype=DOUBLE)), torch.randn(B, T, E, dtype=DOUBLE)


def turn_of(decay: bool) -> Turn:
    return Turn(torch.rand(D, dtype=DOUBLE) if decay else None, torch.randn(D, dtype=DOUBLE))


@given(
    st.integers(1, 23),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["none", "one", "each"]),
    st.integers(1, 4),
    st.integers(1, 9),
)
@settings(max_examples=80, deadline=None)
def test_chunks_are_the_recurrence(T: int, decay: bool, padded: bool, begun: str, every: int, chunk: int) -> None:
    q, keys, v = inputs(T)
    turn = turn_of(decay)
    padding = (torch.rand(B, T) > 0.3).to(DOUBLE) if padded else None
    if padding is not None:
        keys = Keys(keys.size * padding[..., None], keys.angle)
    state = None if begun == "none" else torch.randn(B if begun == "each" else 1, 2 * D, E + 1, dtype=DOUBLE)
    every = 1 if padded else every  # which tokens read is counted in real ones
    sums, read, after = step_by_step(q, keys, v, turn, state, padding)
    found = read_and_write(q[:, ::every], keys, v, turn, state, padding, wants_state=True, every=every, chunk=chunk)
    for name, one, other in zip(("sums", "read", "state"), found, (sums[:, ::every], read[:, ::every], after)):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")
    again = read_and_write(q[:, ::every], keys, v, turn, state, padding, wants_state=T == 1, every=every, chunk=chunk)
    assert torch.equal(again[0], found[0]) and torch.equal(again[1], found[1])
    assert T == 1 or again[2] is None
    alone, nothing, column = read_and_write(
        None, keys, None, turn, None if state is None else state[..., -1:], padding, wants_state=True, every=every
    )
    assert nothing is None
    torch.testing.assert_close(alone, sums[:, ::every])
    torch.testing.assert_close(column, after[..., -1:])


@pytest.mark.parametrize("T", [1, 7, 20])
def test_gradients_are_those_of_the_recurrence(T: int) -> None:
    q, keys, v = inputs(T)
    turn, state = turn_of(True), torch.randn(B, 2 * D, E + 1, dtype=DOUBLE)
    leaves = [x.requires_grad_() for x in (q, *keys, v, *turn, state)]
    outputs = step_by_step(q, keys, v, turn, state, None)
    found = read_and_write(q, keys, v, turn, state, None, wants_state=True, chunk=6)
    cotangents = [torch.randn_like(x) for x in outputs]
    wanted = torch.autograd.grad(outputs, leaves, cotangents)
    for one, other in zip(torch.autograd.grad(found, leaves, cotangents), wanted):
        torch.testing.assert_close(one, other)


def test_fast_decay_stays_finite_within_a_chunk() -> None:
    """A decay of almost 1 per token, the largest there is: ``exp(64)`` is far from float32's end, sums are the same."""
    T = 200
    q, keys, v = inputs(T)
    turn = Turn(torch.full((D,), 0.999, dtype=DOUBLE), torch.zeros(D, dtype=DOUBLE))
    low = read_and_write(
        q.float(), Keys(*(x.float() for x in keys)), v.float(), Turn(*(x.float() for x in turn)), None, None,
        wants_state=True,
    )  # fmt: skip
    for one, other in zip(low, step_by_step(q, keys, v, turn, None, None)):
        assert one is not None
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-5)


def test_what_is_read_is_not_what_is_written_next() -> None:
    """A step returns copies, so that the new state may be written where the old one is."""
    q, keys, v = inputs(1)
    state = torch.randn(B, 2 * D, E + 1, dtype=DOUBLE)
    sums, read, after = read_and_write(q, keys, v, turn_of(False), state, None, wants_state=True)
    kept = sums.clone()
    assert read is not None and after is not None
    state.copy_(after)
    assert torch.equal(sums, kept)


def test_turns_add_up() -> None:
    turn, x = turn_of(True), torch.randn(5, 2, D, dtype=DOUBLE)
    a, b = torch.randn(2, 5, dtype=DOUBLE)
    torch.testing.assert_close(rotate_by(rotate_by(x, turn, a), turn, b), rotate_by(x, turn, a + b))
    torch.testing.assert_close(rotate_by(x, turn, a, 2.0), rotate_by(x, turn, a) * torch.exp(-2 * turn.decay_D))
    still = turn._replace(decay_D=None)
    torch.testing.assert_close(rotate_by(x, still, a).square().sum(1), x.square().sum(1))
    size, angle = torch.randn(2, 4, D, dtype=DOUBLE)
    expected = size * torch.exp(1j * angle)
    torch.testing.assert_close(phased(size, angle), torch.stack((expected.real, expected.imag), dim=1))


@pytest.mark.parametrize("every", [65, 100, 2**20])
def test_rare_reading_of_a_memory_that_fades_at_once(every: int) -> None:
    """Powers of a whole distance between two readings would leave float32."""
    tokens = 300
    q, keys, v = inputs(tokens)
    turn = Turn(torch.ones(D, dtype=DOUBLE), torch.randn(D, dtype=DOUBLE))
    expected = step_by_step(q, keys, v, turn, None, None)
    low = q[:, ::every].float().requires_grad_(), Keys(*(x.float() for x in keys)), v.float()
    found = read_and_write(*low, Turn(*(x.float() for x in turn)), None, None, wants_state=True, every=every)
    for one, other in zip(found, (expected[0][:, ::every], expected[1][:, ::every], expected[2]), strict=True):
        assert one is not None
        torch.testing.assert_close(one.double(), other, atol=1e-4, rtol=1e-4)
    assert found[1] is not None
    assert torch.autograd.grad(found[1].sum(), low[0])[0].isfinite().all()


def test_reading_less_than_once_costs_no_more_than_the_text() -> None:
    tokens, every = 200, 2**20
    keys = Keys(*torch.randn(2, 1, tokens, 4))
    turn = Turn(None, torch.rand(4))
    sums, _, state = read_and_write(None, keys, None, turn, None, None, wants_state=True, every=every)
    _, _, expected = read_and_write(None, keys, None, turn, None, None, wants_state=True)
    assert sums.shape == (1, 1, 2, 4) and not sums.any()
    torch.testing.assert_close(state, expected, atol=1e-4, rtol=1e-4)
