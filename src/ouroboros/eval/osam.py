"""What the memories of an OSAM model hold while it reads a text: their size by position, gates, phases, frequencies.

Everything is computed here, from the state as it is kept, and only when it is asked for. The published norms are those
of the sketched state: ``|S x|^2 = x^T G x`` with ``G = S^T S``, so that it need not be formed.
Shapes: B batch, T tokens, D model width, N measured positions.
"""

from __future__ import annotations

import dataclasses
import functools
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from ouroboros.nn.visit import VisitContext
from torch import Tensor, nn

from ouroboros.config import ModelSpec
from ouroboros.config.parts.osam import OsamSpec
from ouroboros.errors import check
from ouroboros.eval.probes import position_nats
from ouroboros.eval.score import evaluating
from ouroboros.nn.linear_memory import Keys, Turn, read_and_write
from ouroboros.nn.osam import Factors, Osam
from ouroboros.nn.sketch import gram_matrix, reachable_buckets

ROWS = 4
"""Sequences that :func:`telemetry` looks at unless told otherwise."""
POSITIONS = 16
"""About as many positions of each."""


@dataclass(frozen=True, kw_only=True)
class MemoryRecord:
    """One visit's memory on a batch of texts. Norms are means over sequences."""

    slot: int
    """The visit's position in the schedule."""
    block: int
    loop: int
    positions: list[int]
    """Measured positions: tokens in front, registers included; such that read."""
    feature_norm: list[float]
    """``|psi|`` at each of them."""
    key_norm: list[float]
    """Norm of the sketched sum of keys, with that position's own."""
    value_norm: list[float] | None
    """Norm of a row of the sketched memory of values, mean over rows; None without the value path."""
    phi_norm: float
    """Mean of ``feature_norm``, as published."""
    s1_norm: float
    """Mean of ``key_norm`` plus mean of ``value_norm``, as published."""
    gate_feature: float
    gate_value: float
    """0 without the value path."""
    theta_q: float
    theta_k: float
    omega: list[float]
    """Radians per token of each group of coordinates."""
    decay: list[float] | None
    """Of each group, per token; None without decay."""
    reached_buckets: int
    """Buckets of the feature that some pair of coordinates falls into; the others stay 0 for ever."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


class _Seen(NamedTuple):
    """What a visit's mixer was given."""

    mixer: Osam
    x_BTD: Tensor
    given: VisitContext
    state: Tensor | None


def telemetry(model: Any, ids: Tensor, *, stride: int | None = None, rows: int | None = ROWS) -> list[MemoryRecord]:
    """One record for each visit, in the order of the schedule.

    Args:
        model: a model with OSAM mixers, in whatever mode; it is run once in evaluation mode, uncompiled.
        ids: token ids (B, T), without padding.
        stride: positions divisible by this are measured, of those that read; None: about :data:`POSITIONS` of them.
        rows: sequences that are looked at; None: all.

    Raises:
        OuroborosError: the model has other mixers.
    """
    inner = model.model
    check(isinstance(inner.spec.block.mixer, OsamSpec), f"memory telemetry is of osam, not of {inner.spec.block.mixer.kind}")
    visits, seen = inner.schedule.visits, list[_Seen]()

    def look(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        x_BTD, given, memory = arguments
        assert isinstance(module, Osam)
        seen.append(_Seen(module, x_BTD, given, None if memory is None else memory.state()))

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled blocks call no hooks
        for module in inner.modules():
            if isinstance(module, Osam):
                stack.callback(module.register_forward_pre_hook(look).remove)
        inner(ids[:rows], use_cache=False)
        stride = max(ids.shape[1] // POSITIONS, 1) if stride is None else stride
        # Registers run by themselves first; the text's own pass comes last.
        texts = zip(visits, seen[-len(visits) :], strict=True)
        return [_record(visit.slot, visit.block, visit.loop, it, stride) for visit, it in texts]


def reading_losses(model: Any, ids: np.ndarray) -> dict[str, float]:
    """Mean loss, nats, of the tokens predicted where the memory is read and of those predicted where it is skipped.

    Args:
        model: a model with OSAM mixers; empty if every position reads.
        ids: token ids (B, T), without padding.
    """
    mixer, registers = model.model.spec.mixer, model.model.spec.registers
    if mixer.kupdate == 1:
        return {}
    nats = position_nats(model, ids)
    reads = (np.arange(len(nats)) + registers) % mixer.kupdate == 0
    parts = {"read": nats[reads], "skipped": nats[~reads]}
    return {name: float(part.mean()) for name, part in parts.items() if len(part)}


def _record(slot: int, block: int, loop: int, seen: _Seen, stride: int) -> MemoryRecord:
    mixer, x_BTD, given, state = seen
    dtype = torch.promote_types(x_BTD.dtype, torch.float32)
    positions = given.positions
    if positions is None:
        positions = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None]
    given = given._replace(positions=positions)
    factors = mixer.factors(x_BTD, given, dtype)
    tokens = positions[0]
    at = ((tokens % mixer.spec.kupdate == 0) & (tokens % stride == 0)).nonzero().flatten().tolist()
    check(bool(at), f"no position that reads is divisible by the stride {stride}")
    feature = _feature_norms(mixer, factors, state, at, tokens[at])
    keys, values = _state_norms(mixer, factors, state, at)
    gate_feature, gate_value = mixer.gates(dtype)
    theta_q, theta_k = mixer.phases(dtype)
    turn, size = mixer.turn(dtype), x_BTD.shape[-1] // mixer.spec.frequencies
    mean = functools.partial(torch.mean, dtype=torch.float64)
    return MemoryRecord(
        slot=slot,
        block=block,
        loop=loop,
        positions=tokens[at].tolist(),
        feature_norm=feature.tolist(),
        key_norm=keys.tolist(),
        value_norm=None if values is None else values.tolist(),
        phi_norm=mean(feature).item(),
        s1_norm=mean(keys).item() + (0.0 if values is None else mean(values).item()),
        gate_feature=gate_feature.item(),
        gate_value=0.0 if gate_value is None else gate_value.item(),
        theta_q=theta_q.item(),
        theta_k=theta_k.item(),
        omega=turn.frequency_D[::size].tolist(),
        decay=None if turn.decay_D is None else turn.decay_D[::size].tolist(),
        reached_buckets=reachable_buckets(mixer.query_sketch, mixer.key_sketch, mixer.spec.buckets),
    )


def _feature_norms(mixer: Osam, factors: Factors, state: Tensor | None, at: list[int], tokens_N: Tensor) -> Tensor:
    """``|psi|`` (N,), mean over sequences."""
    sums = _read(factors, mixer.turn(factors.query.dtype), state)[:, at]
    count_1N1 = (tokens_N + 1).to(sums.dtype)[None, :, None]
    return mixer.feature(factors.query[:, at], sums, count_1N1).norm(dim=-1).mean(0)


def _read(factors: Factors, turn: Turn, state: Tensor | None) -> Tensor:
    """Sums of keys (B, T, 2, D) before each token."""
    return read_and_write(
        None, factors.key, None, turn, None if state is None else state[..., -1:], None, wants_state=False
    )[0]


def _state_norms(mixer: Osam, factors: Factors, state: Tensor | None, at: list[int]) -> tuple[Tensor, Tensor | None]:
    """Norms of the sketched sum of keys and of the rows of the sketched memory of values, (N,) each: means."""
    turn, dtype = mixer.turn(factors.query.dtype), factors.query.dtype
    gram = gram_matrix(mixer.key_sketch, dtype)
    of_values = gram if mixer.spec.sketch_values else torch.eye(len(gram), dtype=dtype, device=gram.device)
    keys, values, start = [], [], 0
    for position in at:
        part = slice(start, position + 1)
        key = Keys(*(x[:, part] for x in factors.key))
        value = None if factors.value is None else factors.value[:, part]
        _, _, state = read_and_write(None, key, value, turn, state, None, wants_state=True)
        assert state is not None
        pairs_B2DE = state.unflatten(1, (2, -1))
        keys.append(_norm(pairs_B2DE[..., -1:], gram).mean())
        values.append(_norm(pairs_B2DE[..., :-1], of_values).mean())
        start = position + 1
    return torch.stack(keys), torch.stack(values) if mixer.spec.value_path else None


def _norm(x_B2DE: Tensor, gram: Tensor) -> Tensor:
    """``sqrt(x^T G x)`` of every column, over both parts, (B, E)."""
    return ((gram @ x_B2DE) * x_B2DE).sum((1, 2)).clamp(min=0).sqrt()


def idle_buckets(spec: ModelSpec) -> str | None:
    """A sentence if the sketch has more buckets than there are products of coordinates; with one table the pairs i, j
    and j, i are one."""
    mixer, d = spec.block.mixer, spec.hidden_size
    if not isinstance(mixer, OsamSpec):
        return None
    products = d * d if mixer.independent_hashes else d * (d + 1) // 2
    if mixer.buckets <= products:
        return None
    return (
        f"mixer.buckets is {mixer.buckets:,} and a width of {d} has {products:,} products of coordinates: the buckets"
        f" beyond are never reached, and their weights are not trained; {products:,} or fewer do the same"
    )
