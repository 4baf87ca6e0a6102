"""Loop parts against their formulas; neutral at the start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ouroboros.config import LoopSpec
from ouroboros.nn.loop import LoopParts

D = 6


def build(loops: int = 3, *, random: bool = True, **changes: Any) -> LoopParts:
    """Loop parts, with random weights or as they start."""
    parts = LoopParts(LoopSpec(**changes), D, loops, 1e-6)
    for parameter in parts.parameters() if random else ():
        torch.nn.init.normal_(parameter)
    return parts


@pytest.fixture
def states() -> tuple[Tensor, Tensor]:
    """Two states (B, T, D)."""
    x, other = torch.randn(2, 2, 4, D)
    return x, other


def test_off_is_the_identity(states: tuple[Tensor, Tensor]) -> None:
    parts, (x, z) = build(), states
    assert parts.enter(x, z, 0) is x
    assert parts.leave(x, z, 0) is z
    assert list(parts.parameters()) == []


@pytest.mark.parametrize("changes", [{"embedding": True}, {"inject": "add"}, {"inject": "concat"}], ids=str)
def test_neutral_at_the_start(changes: dict[str, Any], states: tuple[Tensor, Tensor]) -> None:
    parts, (x, x0) = build(random=False, **changes), states
    assert torch.equal(parts.enter(x, x0, 1), x)
    assert sum(p.numel() for p in parts.parameters()) > 0


def test_injection(states: tuple[Tensor, Tensor]) -> None:
    x, x0 = states
    add, concat = build(inject="add"), build(inject="concat")
    torch.testing.assert_close(add.enter(x, x0, 1), x + add.inject_scale * x0)
    weight = concat.inject_proj.weight
    torch.testing.assert_close(concat.enter(x, x0, 1), x @ weight[:, :D].T + x0 @ weight[:, D:].T)


def test_embedding_by_loop_and_last_row_beyond(states: tuple[Tensor, Tensor]) -> None:
    parts, (x, x0) = build(embedding=True), states
    for loop, row in ((0, 0), (2, 2), (3, 2), (9, 2)):
        torch.testing.assert_close(parts.enter(x, x0, loop), x + parts.embedding[row])


def test_embedding_comes_after_injection(states: tuple[Tensor, Tensor]) -> None:
    parts, (x, x0) = build(embedding=True, inject="add"), states
    torch.testing.assert_close(parts.enter(x, x0, 1), x + parts.inject_scale * x0 + parts.embedding[1])


def test_norm_by_loop(states: tuple[Tensor, Tensor]) -> None:
    parts, (x, z) = build(norm=True), states
    for loop, row in ((0, 0), (1, 1), (7, 2)):
        expected = z / torch.sqrt(z.square().mean(-1, keepdim=True) + 1e-6) * parts.norm[row]
        torch.testing.assert_close(parts.leave(x, z, loop), expected)


def test_gate(states: tuple[Tensor, Tensor]) -> None:
    parts, (x, z) = build(gate=True), states
    gate = torch.sigmoid(torch.cat((z, x), dim=-1) @ parts.gate_proj.weight.T + parts.gate_proj.bias)
    torch.testing.assert_close(parts.leave(x, z, 0), gate * z + (1 - gate) * x)


def test_gate_starts_at_its_bias(states: tuple[Tensor, Tensor]) -> None:
    parts, (x, z) = build(random=False, gate=True, gate_bias=1.0), states
    gate = torch.sigmoid(torch.tensor(1.0))
    torch.testing.assert_close(parts.leave(x, z, 0), gate * z + (1 - gate) * x)


def test_contractive_step(states: tuple[Tensor, Tensor]) -> None:
    x, z = states
    torch.testing.assert_close(build(contractive=0.25).leave(x, z, 0), 0.75 * x + 0.25 * z)
    assert build(contractive=1.0).leave(x, z, 0) is z


def test_order_on_leaving(states: tuple[Tensor, Tensor]) -> None:
    """Norm, then gate, then contractive step."""
    parts, (x, z) = build(norm=True, gate=True, contractive=0.5), states
    normed = z / torch.sqrt(z.square().mean(-1, keepdim=True) + 1e-6) * parts.norm[1]
    gate = torch.sigmoid(torch.cat((normed, x), dim=-1) @ parts.gate_proj.weight.T + parts.gate_proj.bias)
    gated = gate * normed + (1 - gate) * x
    torch.testing.assert_close(parts.leave(x, z, 1), 0.5 * x + 0.5 * gated)


@pytest.mark.parametrize(("max_loops", "rows"), [(None, 3), (1, 1), (8, 8)])
def test_rows(max_loops: int | None, rows: int) -> None:
    parts = build(loops=3, embedding=True, norm=True, max_loops=max_loops)
    assert parts.embedding.shape == parts.norm.shape == (rows, D)


def test_reset_restores_the_start() -> None:
    changes: dict[str, Any] = {"norm": True, "embedding": True, "inject": "concat", "gate": True}
    parts, fresh = build(**changes), build(random=False, **changes)
    for module in parts.modules():
        module.reset_parameters()
    for name, value in fresh.state_dict().items():
        assert torch.equal(parts.state_dict()[name], value), name


def test_low_precision_states_keep_their_dtype() -> None:
    parts = build(norm=True, embedding=True, inject="add", gate=True, contractive=0.5)
    x, z = torch.randn(2, 1, 2, D, dtype=torch.bfloat16)
    parts.gate_proj.bfloat16()
    assert parts.enter(x, z, 0).dtype == parts.leave(x, z, 0).dtype == torch.bfloat16
