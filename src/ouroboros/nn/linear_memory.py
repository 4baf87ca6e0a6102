"""A memory of constant size that every token turns, fades and adds to: complex linear attention without softmax.

``S_{t+1} = L^{r_t} (S_t + r_t k_t v_t^T)`` with ``L = diag(exp(-a_j - i w_j))`` and ``r_t`` 1 for a real token, 0 for
padding. Token t reads ``S_t``: what came before it, and not itself. Tokens are worked on in chunks: within a chunk by
products of queries and keys, between chunks by the state (as in Yang et al. 2024, section 4).
Shapes: B batch, T tokens, N chunks of C tokens, D coordinates, E value channels. Complex coordinates are pairs
(..., 2, D); a state is (B, 2 D, E): the real part's rows first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ouroboros.accounting import CHUNK


class Turn(NamedTuple):
    """How the memory's coordinates turn and fade from one token to the next."""

    decay_D: Tensor | None
    """``a`` >= 0 of each coordinate; None: nothing fades."""
    frequency_D: Tensor
    """``w`` of each coordinate, radians per token."""


def rotate_by(x: Tensor, turn: Turn, steps: Tensor, shift: float = 0.0) -> Tensor:
    """``x L^steps`` for (..., 2, D), ``steps`` (...) of any sign; ``shift`` is added to the steps of decay alone."""
    angle = steps[..., None] * turn.frequency_D
    cos, sin = angle.cos(), angle.sin()
    if turn.decay_D is not None:
        fade = torch.exp(-(steps[..., None] + shift) * turn.decay_D)
        cos, sin = cos * fade, sin * fade
    real, imaginary = x.unbind(-2)
    return torch.stack((real * cos + imaginary * sin, imaginary * cos - real * sin), dim=-2)


def read_and_write(
    q_BT2D: Tensor | None,
    k_BT2D: Tensor,
    v_BTE: Tensor | None,
    turn: Turn,
    state: Tensor | None,
    padding: Tensor | None,
    *,
    wants_state: bool,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What every token reads of the sum of keys and of the memory of values, and the state behind them all.

    Args:
        q_BT2D: complex queries; None: the memory of values is not read.
        k_BT2D: complex keys, 0 where padded.
        v_BTE: real values; None: only keys are summed.
        turn: see above.
        state: (B, 2 D, E + 1): the memory of values, and in its last column the sum of keys; None: empty.
        padding: (B, T), 1 where real; None: all are.
        wants_state: whether the state behind all tokens is needed.
        chunk: tokens of a chunk.

    Returns:
        The sums of keys (B, T, 2, D); what the queries read, ``Re(q S)`` (B, T, E) or None; the state or None.
    """
    T = k_BT2D.shape[1]
    ones = k_BT2D.new_ones(*k_BT2D.shape[:2], 1)
    v_BTE = ones if v_BTE is None else torch.cat((v_BTE, ones), dim=-1)
    if state is not None:
        state = state.expand(k_BT2D.shape[0], -1, -1)  # that of a common prefix
    if T == 1:
        return _step(q_BT2D, k_BT2D, v_BTE, turn, state, padding)
    size = min(T, chunk)
    short = -T % size
    real = None if padding is None else F.pad(padding.to(k_BT2D.dtype), (0, short))
    k, v = _chunks(k_BT2D, size, short), _chunks(v_BTE, size, short)
    if real is None:
        at = torch.arange(size, device=k.device, dtype=k.dtype)
        length = at.new_full((1, k.shape[1], 1), size)
        length[:, -1] -= short
    else:
        real = real.view(real.shape[0], -1, size)
        at = real.cumsum(-1) - real
        length = real.sum(-1)[..., None]
    middle = size / 2
    local_k = rotate_by(k, turn, -at, middle)
    starts, final = _carry(k, v, turn, at, length, state, wants_state=wants_state)
    sums = rotate_by(local_k.cumsum(2) - local_k, turn, at, -middle)
    if starts is not None:
        sums = sums + rotate_by(_pair(starts[..., -1])[:, :, None], turn, at)
    read = None
    if q_BT2D is not None:
        q = _chunks(q_BT2D, size, short)
        keys = local_k * local_k.new_tensor((1.0, -1.0))[:, None]  # Re(q k) = Re q Re k - Im q Im k
        scores = rotate_by(q, turn, at, -middle).flatten(-2) @ keys.flatten(-2).mT
        read = scores.tril(-1) @ v[..., :-1]
        if starts is not None:
            turned = rotate_by(q, turn, at) * local_k.new_tensor((1.0, -1.0))[:, None]
            read = read + turned.flatten(-2) @ starts[..., :-1]
        read = read.flatten(1, 2)[:, :T]
    return sums.flatten(1, 2)[:, :T], read, final


def _step(
    q_B12D: Tensor | None, k_B12D: Tensor, v_B1E: Tensor, turn: Turn, state: Tensor | None, padding: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """One token: one product, one rank-one update and one turn."""
    sign = k_B12D.new_tensor((1.0, -1.0))[:, None]
    if state is None:
        state = k_B12D.new_zeros(k_B12D.shape[0], k_B12D[0].numel(), v_B1E.shape[-1])
    read = None
    if q_B12D is not None:
        read = (q_B12D * sign).flatten(-2) @ state[..., :-1]
    grown = torch.baddbmm(state, k_B12D.flatten(-2).mT, v_B1E)
    steps = k_B12D.new_ones(1, 1) if padding is None else padding.to(k_B12D.dtype)
    # A copy: the caller may write the new state where the old one is.
    return _pair(state[..., -1].clone())[:, None], read, _turn_state(grown, turn, steps)


def _carry(
    k: Tensor, v: Tensor, turn: Turn, at: Tensor, length: Tensor, state: Tensor | None, *, wants_state: bool
) -> tuple[Tensor | None, Tensor | None]:
    """States (B, N, 2 D, E + 1) before every chunk, None when all are empty, and the one behind the last if wanted."""
    N = k.shape[1]
    if N == 1 and not wants_state:
        return None if state is None else state[:, None], None
    # Turned to the chunk's end at once: powers up to a whole chunk, and none that grows.
    added = rotate_by(k, turn, length - at).flatten(-2).mT @ v
    run = torch.zeros_like(added[:, 0]) if state is None else state
    before = []
    for index in range(N):
        before.append(run)
        if index < N - 1 or wants_state:
            run = _turn_state(run, turn, length[:, index]) + added[:, index]
    starts = None if N == 1 and state is None else torch.stack(before, dim=1)
    return starts, run if wants_state else None


def _turn_state(state: Tensor, turn: Turn, steps: Tensor) -> Tensor:
    """``L^steps S`` for (B, 2 D, E), ``steps`` (B or 1, 1)."""
    pairs = state.unflatten(1, (2, -1)).movedim(-1, 1)  # (B, E, 2, D)
    return rotate_by(pairs, turn, steps).movedim(1, -1).flatten(1, 2)


def _pair(sum_key: Tensor) -> Tensor:
    """(..., 2 D) to (..., 2, D)."""
    return sum_key.unflatten(-1, (2, -1))


def _chunks(x: Tensor, size: int, short: int) -> Tensor:
    """(B, T, ...) to (B, N, size, ...), ``short`` zeros behind."""
    padded = F.pad(x, (0, 0) * (x.ndim - 2) + (0, short)) if short else x
    return padded.unflatten(1, (-1, size))
