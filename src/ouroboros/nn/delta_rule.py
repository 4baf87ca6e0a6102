"""The delta rule over time: a memory that every token reads, and then corrects (Schlag et al. 2021, arXiv 2102.11174).

Per head ``y_t = S q_t`` and then ``S <- S + b_t (v_t - S k_t) k_t^T``, with ``|q| = |k| = 1`` and ``b`` in (0, 1). As
the keys do not depend on ``S``, a chunk of tokens is worked on at once (Yang et al. 2024, arXiv 2406.06484, section 3):
what its tokens write, ``S' = S + W^T K``, solves ``(I + tril(diag(b) K K^T, -1)) W = diag(b) (V - K S^T)``.
Shapes: B batch, T tokens, D model width, H heads, C channels per head, N chunks of L tokens. A state is (B, H, C, C):
values in rows, keys in columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ouroboros.config.parts.delta_rule import DeltaRuleSpec, chunks
from ouroboros.nn.delta import causal_taps
from ouroboros.nn.memory import Memory
from ouroboros.nn.part import Init, Projection, Started
from ouroboros.nn.small import SmallLinear
from ouroboros.nn.visit import VisitContext


class DeltaRule(nn.Module):
    """``o_proj`` of what the heads read; see the module's description."""

    def __init__(self, spec: DeltaRuleSpec, hidden_size: int, norm_eps: float) -> None:
        super().__init__()
        self.spec = spec
        inner = spec.inner(hidden_size)
        self.q_proj = Projection(hidden_size, inner, bias=False)
        self.k_proj = Projection(hidden_size, inner, bias=False)
        self.v_proj = Projection(hidden_size, inner, bias=False)
        self.b_proj = SmallLinear(hidden_size, spec.num_heads, bias=(0.0, 0.0))
        self.o_proj = Projection(inner, hidden_size, bias=False)
        self.filter = Filter(spec.conv, 3 * inner) if spec.conv else None

    def forward(self, x_BTD: Tensor, visit: VisitContext) -> Tensor:
        """Mix (B, T, D) over time.

        Args:
            x_BTD: the (normalised) stream.
            visit: padding, and the state, which is read and replaced; rotary tables and masks are not used.
        """
        memory, padding = visit.memory, visit.padding
        # A sum over a whole text, and a solution, need float32 whatever the products around them are computed in.
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        qkv = torch.cat((self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)), dim=-1)
        if self.filter is not None:
            qkv = self.filter(qkv, memory, padding)
        q, k, v = qkv.to(dtype).unflatten(-1, (3, self.spec.num_heads, -1)).permute(2, 0, 3, 1, 4)
        b_BTH = torch.sigmoid(self.b_proj(x_BTD).to(dtype))
        if padding is not None:
            b_BTH = b_BTH * padding[..., None]  # at 0 nothing is written
        keeps = memory is not None and memory.keeps
        with torch.autocast(x_BTD.device.type, enabled=False):
            y_BHTC, state = read_and_write(
                F.normalize(q, dim=-1),
                F.normalize(k, dim=-1),
                v,
                b_BTH.transpose(1, 2),
                None if memory is None else memory.state(),
                wants_state=keeps,
            )
        if keeps:
            assert memory is not None and state is not None
            memory.carry(state, x_BTD.shape[1])
        return self.o_proj(y_BHTC.transpose(1, 2).flatten(2).to(x_BTD.dtype))


class Filter(Started):
    """A causal filter over tokens for each channel; passes the present token through at the start."""

    PARAMETER_ROLES = {"weight": "vector"}

    def __init__(self, taps: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(taps, channels))
        self.reset_parameters()

    def reset_parameters(self, init: Init | None = None) -> None:
        """The last tap is 1."""
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.weight[-1])

    def forward(self, x_BTE: Tensor, memory: Memory | None, padding_BT: Tensor | None) -> Tensor:
        """(B, T, E) to the same; ``memory`` remembers the last entries, and padded ones count as zero."""
        weight = self.weight[:, None, None]
        return causal_taps(x_BTE[..., None, :], weight, memory, padding_BT, "filter").squeeze(2)


def read_and_write(
    q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, b_BHT: Tensor, state: Tensor | None, *, wants_state: bool
) -> tuple[Tensor, Tensor | None]:
    """What every token reads before it writes, and the state behind them all.

    Args:
        q_BHTC: queries.
        k_BHTC: keys, of length 1.
        v_BHTC: values.
        b_BHT: how far the memory of a key moves towards the value; 0 where padded.
        state: (B or 1, H, C, C); None: empty.
        wants_state: whether the state behind all tokens is needed.

    Returns:
        (B, H, T, C), and the state (B, H, C, C) or None.
    """
    T = q_BHTC.shape[2]
    if state is not None and T == 1:
        return _step(q_BHTC, k_BHTC, v_BHTC, b_BHT, state)
    count, size = chunks(T)
    if short := count * size - T:  # nothing is written behind the last token
        q_BHTC, k_BHTC, v_BHTC = (F.pad(x, (0, 0, 0, short)) for x in (q_BHTC, k_BHTC, v_BHTC))
        b_BHT = F.pad(b_BHT, (0, short))
    q, k, v, b = (x.unflatten(2, (count, size)) for x in (q_BHTC, k_BHTC, v_BHTC, b_BHT))
    both = torch.cat((k, q), dim=-2)
    of_keys, of_queries = (both @ k.mT).chunk(2, dim=-2)
    eye = torch.eye(size, dtype=b.dtype, device=b.device)
    # Reads what is below the diagonal alone.
    solved = torch.linalg.solve_triangular(b[..., None] * of_keys, eye, upper=False, unitriangular=True)
    solved = solved * b[..., None, :]
    reads = []
    # Unbound, so that the gradients of all chunks are put together once.
    chunked = zip(*(x.unbind(2) for x in (both, k, v, solved, of_queries.tril(-1))), strict=True)
    for index, (both_n, k_n, v_n, solved_n, before_n) in enumerate(chunked):
        if state is None:
            written = solved_n @ v_n
            reads.append(before_n @ written)
        else:
            remembered, read = (both_n @ state.mT).chunk(2, dim=-2)
            written = solved_n @ (v_n - remembered)
            reads.append(read + before_n @ written)
        if wants_state or index + 1 < count:
            added = written.mT @ k_n
            state = added if state is None else state + added
    return torch.cat(reads, dim=2)[:, :, :T], state


def _step(q: Tensor, k: Tensor, v: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token: one product and one rank-one update."""
    remembered, read = (torch.cat((k, q), dim=-2) @ state.mT).chunk(2, dim=-2)
    return read, torch.addcmul(state, (b[..., None] * (v - remembered)).mT, k)
