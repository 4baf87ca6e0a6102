"""A memory of constant size that every token turns, fades and adds to: complex linear attention without softmax.

``S_{t+1} = L^{r_t} (S_t + r_t k_t v_t^T)`` with ``L = diag(exp(-a_j - i w_j))`` and ``r_t`` 1 for a real token, 0 for
padding. Token t reads ``S_t``: what came before it, and not itself. Tokens are worked on in chunks: within a chunk by
products of queries and keys, between chunks by the state (as in Yang et al. 2024, section 4).
Shapes: B batch, T tokens, N chunks of C tokens, D coordinates, E value channels. Complex coordinates are pairs
(..., 2, D); a state is (B, 2 D, E): the real part's rows first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ouroboros.config.parts.osam import CHUNK, FADING_CHUNK


class Turn(NamedTuple):
    """How the memory's coordinates turn and fade from one token to the next."""

    decay_D: Tensor | None
    """``a`` >= 0 of each coordinate; None: nothing fades."""
    frequency_D: Tensor
    """``w`` of each coordinate, radians per token."""


class Keys(NamedTuple):
    """Complex keys ``size * exp(i angle)``, each (B, T, D)."""

    size: Tensor
    """Real, of either sign; 0 where padded."""
    angle: Tensor


def phased(size: Tensor, angle: Tensor) -> Tensor:
    """``size * exp(i angle)`` (..., 2, D) from (..., D) twice."""
    return torch.stack((size * angle.cos(), size * angle.sin()), dim=-2)


def rotate_by(x: Tensor, turn: Turn, steps: Tensor, shift: float = 0.0) -> Tensor:
    """``x L^steps`` for (..., 2, D), ``steps`` (...) of any sign; ``shift`` is added to the steps of decay alone."""
    cos, sin = _powers(turn, steps, shift)
    real, imaginary = x.unbind(-2)
    return torch.stack((real * cos + imaginary * sin, imaginary * cos - real * sin), dim=-2)


def turn_rows(state: Tensor, turn: Turn, steps: Tensor, shift: float = 0.0) -> Tensor:
    """``L^steps S`` for (B, 2 D, E), ``steps`` one number, (B or 1,) or (B or 1, 1); ``shift`` as above."""
    cos, sin = (part[..., None] for part in _powers(turn, steps.flatten(), shift))
    real, imaginary = state.chunk(2, dim=1)
    return torch.cat((real * cos + imaginary * sin, imaginary * cos - real * sin), dim=1)


def _powers(turn: Turn, steps: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """Real part and negative imaginary part of ``L^steps``, (..., D) each."""
    angle = steps[..., None] * turn.frequency_D
    cos, sin = angle.cos(), angle.sin()
    if turn.decay_D is None:
        return cos, sin
    fade = torch.exp(-(steps[..., None] + shift) * turn.decay_D)
    return cos * fade, sin * fade


def read_and_write(
    q_BR2D: Tensor | None,
    keys: Keys,
    v_BTE: Tensor | None,
    turn: Turn,
    state: Tensor | None,
    padding: Tensor | None,
    *,
    wants_state: bool,
    every: int = 1,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What tokens read of the sum of keys and of the memory of values, and the state behind them all.

    Args:
        q_BR2D: complex queries of the R tokens that read; None: the memory of values is not read.
        keys: of all T tokens.
        v_BTE: real values; None: only keys are summed.
        turn: see above.
        state: (B, 2 D, E + 1): the memory of values, and in its last column the sum of keys; None: empty.
        padding: (B, T), 1 where real; None: all are.
        wants_state: whether the state behind all tokens is needed.
        every: tokens 0, every, 2 every, .. read.
        chunk: tokens of a chunk, about; None chooses.

    Returns:
        The sums of keys (B, R, 2, D); what the queries read, ``Re(q S)`` (B, R, E) or None; the state or None.
    """
    B, T, _ = keys.size.shape
    if state is not None:
        state = state.expand(B, -1, -1)  # that of a common prefix
    if T == 1:
        return _step(q_BR2D, keys, v_BTE, turn, state, padding)
    if chunk is None:
        chunk = CHUNK if turn.decay_D is None else FADING_CHUNK
    if turn.decay_D is not None and chunk < min(every, T):
        # In chunks as long as the distance of two readings the powers of the decay would overflow: all tokens read.
        q_BT2D = None if q_BR2D is None else _spread(q_BR2D, T, every)
        found = read_and_write(q_BT2D, keys, v_BTE, turn, state, padding, wants_state=wants_state, chunk=chunk)
        return found[0][:, ::every], None if found[1] is None else found[1][:, ::every], found[2]
    size = T if chunk >= T else min(T, max(chunk // every, 1) * every)
    rows = -(-T // every)
    key = Keys(*(_chunks(x, size) for x in keys))
    at, length = _clock(key.size, T, padding)
    middle = 0.0 if turn.decay_D is None else size / 2
    local_k = _since_start(key, turn, at, middle)
    v = None if v_BTE is None else _chunks(v_BTE, size)
    starts, final = _carry(local_k, v, turn, length, middle, state, wants_state=wants_state)

    reads = at[..., ::every]
    before = torch.ones(size, size, dtype=local_k.dtype, device=local_k.device).tril(-1)[::every]
    sums = rotate_by((before @ local_k.flatten(-2)).unflatten(-1, (2, -1)), turn, reads, -middle)
    if starts is not None:
        sums = sums + rotate_by(starts.sums[:, :, None], turn, reads)
    read = None
    if q_BR2D is not None and v is not None:
        q = _chunks(q_BR2D, -(-size // every))
        read = _read_values(q, local_k, v, turn, reads, middle, before, starts).flatten(1, 2)[:, :rows]
    return sums.flatten(1, 2)[:, :rows], read, final


def _spread(q_BR2D: Tensor, tokens: int, every: int) -> Tensor:
    """Queries of all tokens (B, T, 2, D), 0 for those that do not read."""
    spread = q_BR2D.new_zeros(q_BR2D.shape[0], tokens, *q_BR2D.shape[2:])
    spread[:, ::every] = q_BR2D
    return spread


def _read_values(
    q: Tensor,
    local_k: Tensor,
    v: Tensor,
    turn: Turn,
    reads: Tensor,
    middle: float,
    before: Tensor,
    starts: _Run | None,
) -> Tensor:
    """``Re(q S)`` of queries (B, N, R, 2, D): from their own chunk and from the state before it, (B, N, R, E)."""
    # Re(q k) = Re q Re k - Im q Im k
    q = q * q.new_tensor((1.0, -1.0))[:, None]
    conjugate = turn._replace(frequency_D=-turn.frequency_D)  # of the flipped imaginary part
    turned = rotate_by(q, conjugate, reads, -middle)
    read = (turned.flatten(-2) @ local_k.flatten(-2).mT * before) @ v
    if starts is not None and starts.values is not None:
        turned = turned if turn.decay_D is None else rotate_by(q, conjugate, reads)
        read = read + turned.flatten(-2) @ starts.values
    return read


class _Run(NamedTuple):
    """A state in two parts."""

    sums: Tensor
    """(..., 2, D)."""
    values: Tensor | None
    """(..., 2 D, E)."""


def _step(
    q_B12D: Tensor | None,
    keys: Keys,
    v_B1E: Tensor | None,
    turn: Turn,
    state: Tensor | None,
    padding: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """One token: one product, one rank-one update and one turn."""
    k_B12D = phased(*keys)
    ones = keys.size.new_ones(len(keys.size), 1, 1)
    v_B1E = ones if v_B1E is None else torch.cat((v_B1E, ones), dim=-1)
    if state is None:
        state = k_B12D.new_zeros(k_B12D.shape[0], k_B12D[0].numel(), v_B1E.shape[-1])
    read = None
    if q_B12D is not None:
        read = (q_B12D * k_B12D.new_tensor((1.0, -1.0))[:, None]).flatten(-2) @ state[..., :-1]
    # Elementwise, so that a compiled step updates, turns and writes in one pass.
    grown = torch.addcmul(state, k_B12D.flatten(-2).mT, v_B1E)
    steps = keys.size.new_ones(1, 1) if padding is None else padding.to(keys.size.dtype)
    # A copy of the sums: the caller may write the new state where the old one is.
    return _pair(state[..., -1].clone())[:, None], read, turn_rows(grown, turn, steps)


def _clock(like_BNCD: Tensor, tokens: int, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """Real tokens of its chunk before each token, (B, N, C) or (C,), and those of every chunk, (B or 1, N)."""
    _, N, C, _ = like_BNCD.shape
    if padding is None:
        at = torch.arange(C, device=like_BNCD.device, dtype=like_BNCD.dtype)
        length = at.new_full((1, N), C)
        length[:, -1] -= N * C - tokens
        return at, length
    real = _chunks(padding.to(like_BNCD.dtype), C)
    return real.cumsum(-1) - real, real.sum(-1)


def _since_start(key: Keys, turn: Turn, at: Tensor, middle: float) -> Tensor:
    """``k L^-at`` (B, N, C, 2, D), faded to the middle of the chunk instead of to its start: powers stay small."""
    size = key.size
    if turn.decay_D is not None:
        size = size * torch.exp((at[..., None] - middle) * turn.decay_D)
    return phased(size, key.angle + at[..., None] * turn.frequency_D)


def _carry(
    local_k: Tensor,
    v_BNCE: Tensor | None,
    turn: Turn,
    length: Tensor,
    middle: float,
    state: Tensor | None,
    *,
    wants_state: bool,
) -> tuple[_Run | None, Tensor | None]:
    """States before every chunk, (B, N, ..), None when all are empty, and the one behind the last if it is wanted."""
    N = local_k.shape[1]
    given = None
    if state is not None:
        given = _Run(_pair(state[..., -1]), None if v_BNCE is None else state[..., :-1])
    if N == 1 and not wants_state:
        if given is None:
            return None, None
        return _Run(given.sums[:, None], None if given.values is None else given.values[:, None]), None
    used = N if wants_state else N - 1
    new_sums = local_k[:, :used].sum(2)
    new_values = None if v_BNCE is None else local_k[:, :used].flatten(-2).mT @ v_BNCE[:, :used]
    zero = _Run(torch.zeros_like(new_sums[:, 0]), None if new_values is None else torch.zeros_like(new_values[:, 0]))
    run, runs = given, [given or zero]
    for index in range(used):
        steps, values = length[:, index], None
        sums = _advance(None if run is None else run.sums, new_sums[:, index], turn, steps, middle, rotate_by)
        if new_values is not None:
            old = None if run is None else run.values
            values = _advance(old, new_values[:, index], turn, steps, middle, turn_rows)
        run = _Run(sums, values)
        runs.append(run)
    starts = None
    if N > 1 or given is not None:
        before = [run.values for run in runs[:N] if run.values is not None]
        stacked = torch.stack(before, dim=1) if before else None
        starts = _Run(torch.stack([run.sums for run in runs[:N]], dim=1), stacked)
    final = None
    if wants_state:
        column = runs[-1].sums.flatten(-2)[..., None]
        final = column if runs[-1].values is None else torch.cat((runs[-1].values, column), dim=-1)
    return starts, final


def _advance(
    old: Tensor | None, new: Tensor, turn: Turn, steps: Tensor, middle: float, turned: Callable[..., Tensor]
) -> Tensor:
    """A state behind a chunk, from that before it (None: empty) and what the chunk adds, faded to its middle."""
    if old is None:
        return turned(new, turn, steps, -middle)
    if turn.decay_D is None:
        return turned(old + new, turn, steps)
    return turned(old, turn, steps) + turned(new, turn, steps, -middle)


def _pair(sum_key: Tensor) -> Tensor:
    """(..., 2 D) to (..., 2, D)."""
    return sum_key.unflatten(-1, (2, -1))


def _chunks(x: Tensor, size: int) -> Tensor:
    """(B, T, ...) to (B, N, size, ...), zeros behind the last token."""
    short = -x.shape[1] % size
    padded = F.pad(x, (0, 0) * (x.ndim - 2) + (0, short)) if short else x
    return padded.unflatten(1, (-1, size))
