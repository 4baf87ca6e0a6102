"""What the memories of an OSAM model hold while it reads a text: their size by position, gates, phases, frequencies.

Everything is computed here, from the state as it is kept, and only when it is asked for. The published norms are those
of the sketched state: ``|S x|^2 = x^T G x`` with ``G = S^T S``, so that it need not be formed.
Shapes: B batch, T tokens, D model width, N measured positions.
"""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ouroboros.config.parts.osam import OsamSpec
from ouroboros.errors import check
from ouroboros.eval.score import next_token_nats
from ouroboros.eval.stats import Record
from ouroboros.eval.windows import device_of, evaluating
from ouroboros.nn.linear_memory import Keys, read_and_write
from ouroboros.nn.osam import Factors, Osam
from ouroboros.nn.sketch import gram_matrix, reachable_buckets
from ouroboros.nn.visit import VisitContext

ROWS = 4
"""Sequences that :func:`telemetry` looks at unless told otherwise."""
POSITIONS = 16
"""About as many positions of each."""


@dataclass(frozen=True, kw_only=True)
class MemoryRecord(Record):
    """One visit's memory on a batch of texts. Norms are means over sequences."""

    slot: int
    """The visit's position in the schedule."""
    block: int
    loop: int
    positions: list[int]
    """Number of preceding tokens (including registers) at each measured position; all of them read the memory."""
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


def part_records(model: Any, batch: np.ndarray) -> dict[str, Any]:
    """What a training run records of an OSAM model on a ``batch`` (B, T + 1): ``memory``, a record for each visit on
    the first windows; with a kupdate above 1 also ``loss_by_reading``, of all windows. Empty for other mixers."""
    if not isinstance(model.model.spec.block.mixer, OsamSpec):
        return {}
    ids = torch.from_numpy(batch[:ROWS, :-1]).to(device_of(model))
    found: dict[str, Any] = {"memory": [record.to_dict() for record in telemetry(model, ids)]}
    losses = reading_losses(model, batch)
    return found | ({"loss_by_reading": losses} if losses else {})


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
    mixer = inner.spec.block.mixer
    check(isinstance(mixer, OsamSpec), f"memory telemetry is of osam, not of {mixer.kind}")
    stride = max(ids.shape[1] // POSITIONS, 1) if stride is None else stride
    records: dict[int, MemoryRecord] = {}

    def look(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        x_BTD, given = arguments
        assert isinstance(module, Osam)
        # Registers run by themselves first; the text's own pass comes last.
        records[given.visit.slot] = _record(module, x_BTD, given, stride)

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled blocks call no hooks
        for module in inner.modules():
            if isinstance(module, Osam):
                stack.callback(module.register_forward_pre_hook(look).remove)
        inner(ids[:rows], use_cache=False)
    return list(records.values())


def reading_losses(model: Any, ids: np.ndarray) -> dict[str, float]:
    """Mean loss, nats, of the tokens predicted where the memory is read and of those predicted where it is skipped.

    Args:
        model: a model with OSAM mixers; empty if every position reads.
        ids: token ids (B, T), without padding.
    """
    mixer, registers = model.model.spec.block.mixer, model.model.spec.registers
    if mixer.kupdate == 1:
        return {}
    nats = next_token_nats(model, torch.from_numpy(ids)).mean(0).numpy()
    reads = (np.arange(len(nats)) + registers) % mixer.kupdate == 0
    parts = {"read": nats[reads], "skipped": nats[~reads]}
    return {name: float(part.mean()) for name, part in parts.items() if len(part)}


def _record(mixer: Osam, x_BTD: Tensor, given: VisitContext, stride: int) -> MemoryRecord:
    dtype = torch.promote_types(x_BTD.dtype, torch.float32)
    state = None if given.memory is None else given.memory.state()
    if given.positions is None:
        given = given._replace(positions=torch.arange(x_BTD.shape[1], device=x_BTD.device)[None])
    assert given.positions is not None and given.visit is not None
    factors, tokens = mixer.factors(x_BTD, given, dtype), given.positions[0]
    at = ((tokens % mixer.spec.kupdate == 0) & (tokens % stride == 0)).nonzero().flatten().tolist()
    check(bool(at), f"no position that reads is divisible by the stride {stride}")
    feature = _feature_norms(mixer, factors, state, at, tokens[at])
    keys, values = _state_norms(mixer, factors, state, at)
    gate_feature, gate_value = mixer.gates(dtype)
    theta_q, theta_k = mixer.phases(dtype)
    turn, size = mixer.turn(dtype), x_BTD.shape[-1] // mixer.spec.frequencies
    value_norm = 0.0 if values is None else values.double().mean().item()
    return MemoryRecord(
        **dataclasses.asdict(given.visit),
        positions=tokens[at].tolist(),
        feature_norm=feature.tolist(),
        key_norm=keys.tolist(),
        value_norm=None if values is None else values.tolist(),
        phi_norm=feature.double().mean().item(),
        s1_norm=keys.double().mean().item() + value_norm,
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
    turn, key_sum = mixer.turn(factors.query.dtype), None if state is None else state[..., -1:]
    sums, _, _ = read_and_write(None, factors.key, None, turn, key_sum, None, wants_state=False)
    count_1N1 = (tokens_N + 1).to(sums.dtype)[None, :, None]
    return mixer.feature(factors.query[:, at], sums[:, at], count_1N1).norm(dim=-1).mean(0)


def _state_norms(mixer: Osam, factors: Factors, state: Tensor | None, at: list[int]) -> tuple[Tensor, Tensor | None]:
    """Norms of the sketched sum of keys and of the rows of the sketched memory of values, (N,) each: means."""
    dtype = factors.query.dtype
    gram = gram_matrix(mixer.key_sketch, dtype)
    of_values = gram if mixer.spec.sketch_values else torch.eye(len(gram), dtype=dtype, device=gram.device)
    keys, values, start = [], [], 0
    for position in at:
        part = slice(start, position + 1)
        key = Keys(*(x[:, part] for x in factors.key))
        value = None if factors.value is None else factors.value[:, part]
        state = read_and_write(None, key, value, mixer.turn(dtype), state, None, wants_state=True)[2]
        assert state is not None
        pairs_B2DE = state.unflatten(1, (2, -1))
        keys.append(_norm(pairs_B2DE[..., -1:], gram).mean())
        values.append(_norm(pairs_B2DE[..., :-1], of_values).mean())
        start = position + 1
    return torch.stack(keys), torch.stack(values) if mixer.spec.value_path else None


def _norm(x_B2DE: Tensor, gram: Tensor) -> Tensor:
    """``sqrt(x^T G x)`` of every column, over both parts, (B, E)."""
    return ((gram @ x_B2DE) * x_B2DE).sum((1, 2)).clamp(min=0).sqrt()
