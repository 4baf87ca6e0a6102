"""Loop parts against their formulas; neutral at the start. Their order is the executor's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ouroboros.config import LoopPart
from ouroboros.config.part import build as build_part
from ouroboros.config.parts.loop import (
    ContractiveStepSpec,
    InjectionSpec,
    LoopEmbeddingSpec,
    LoopGainSpec,
    LoopNormSpec,
    RecurrenceGateSpec,
    UpdateGateSpec,
)
from ouroboros.nn.part import Init, LoopModule

D = 6
EVERY = [
    InjectionSpec(mode="add"),
    InjectionSpec(mode="concat"),
    LoopEmbeddingSpec(),
    LoopNormSpec(),
    RecurrenceGateSpec(),
    UpdateGateSpec(),
    LoopNormSpec(eps=0.5),
    LoopGainSpec(form="scalar"),
    LoopGainSpec(form="channel"),
    LoopGainSpec(form="rms"),
    ContractiveStepSpec(),
]


def build(spec: LoopPart, loops: int = 3, *, random: bool = True) -> LoopModule:
    """A loop part, with random weights or as it starts."""
    part = build_part(spec, D, loops, 1e-6)
    for parameter in part.parameters() if random else ():
        torch.nn.init.normal_(parameter)
    return part


@pytest.fixture
def x() -> Tensor:
    """The state before a loop, (B, T, D)."""
    return torch.randn(2, 4, D)


@pytest.fixture
def z() -> Tensor:
    """The state before the first loop, or that blocks have made, (B, T, D)."""
    return torch.randn(2, 4, D)


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_a_part_acts_on_one_side_of_a_loop_alone(spec: LoopPart, x: Tensor, z: Tensor) -> None:
    part, carried = build(spec), {"x0": z}
    assert (part.enter(x, carried, 0) is x) != (part.leave(x, z, carried, 0) is z)
    assert list(carried) == ["x0"] and carried["x0"] is z


@pytest.mark.parametrize("spec", [part for kind in EVERY for part in kind.neutral()], ids=str)
def test_neutral_at_the_start(spec: LoopPart, x: Tensor, z: Tensor) -> None:
    part = build(spec, random=False)
    assert torch.equal(part.enter(x, {"x0": z}, 1), x) and torch.equal(part.leave(x, z, {"x0": z}, 1), z)
    assert sum(p.numel() for p in part.parameters()) > 0 or spec == ContractiveStepSpec(step=1.0)


def test_injection(x: Tensor, z: Tensor) -> None:
    add, concat = build(InjectionSpec(mode="add")), build(InjectionSpec(mode="concat"))
    torch.testing.assert_close(add.enter(x, {"x0": z}, 1), x + add.scale * z)
    weight = concat.proj.weight
    torch.testing.assert_close(concat.enter(x, {"x0": z}, 1), x @ weight[:, :D].T + z @ weight[:, D:].T)


def test_embedding_by_loop_and_last_row_beyond(x: Tensor, z: Tensor) -> None:
    part = build(LoopEmbeddingSpec())
    for loop, row in ((0, 0), (2, 2), (3, 2), (9, 2)):
        torch.testing.assert_close(part.enter(x, {"x0": z}, loop), x + part.weight[row])


def test_norm_by_loop(x: Tensor, z: Tensor) -> None:
    part = build(LoopNormSpec())
    for loop, row in ((0, 0), (1, 1), (7, 2)):
        expected = z / torch.sqrt(z.square().mean(-1, keepdim=True) + 1e-6) * part.weight[row]
        torch.testing.assert_close(part.leave(x, z, {}, loop), expected)


def test_gate(x: Tensor, z: Tensor) -> None:
    part = build(RecurrenceGateSpec())
    gate = torch.sigmoid(torch.cat((z, x), dim=-1) @ part.proj.weight.T + part.proj.bias)
    torch.testing.assert_close(part.leave(x, z, {}, 0), gate * z + (1 - gate) * x)


def test_update_gate(x: Tensor, z: Tensor) -> None:
    part = build(UpdateGateSpec())
    gate = 2 * torch.sigmoid(torch.cat((z, x), dim=-1) @ part.proj.weight.T + part.proj.bias)
    torch.testing.assert_close(part.leave(x, z, {}, 0), x + gate * (z - x))


def test_norm_adds_its_own_eps(x: Tensor, z: Tensor) -> None:
    expected = z / torch.sqrt(z.square().mean(-1, keepdim=True) + 0.5)
    torch.testing.assert_close(build(LoopNormSpec(eps=0.5), random=False).leave(x, z, {}, 0), expected)


def test_gate_starts_at_its_bias(x: Tensor, z: Tensor) -> None:
    part = build(RecurrenceGateSpec(bias=1.0), random=False)
    gate = torch.sigmoid(torch.tensor(1.0))
    torch.testing.assert_close(part.leave(x, z, {}, 0), gate * z + (1 - gate) * x)


def test_contractive_step(x: Tensor, z: Tensor) -> None:
    torch.testing.assert_close(build(ContractiveStepSpec(step=0.25)).leave(x, z, {}, 0), 0.75 * x + 0.25 * z)
    assert build(ContractiveStepSpec(step=1.0)).leave(x, z, {}, 0) is z


@pytest.mark.parametrize(("form", "numbers"), [("scalar", 1), ("channel", D)])
def test_gain_by_loop_and_last_row_beyond(form: Any, numbers: int, x: Tensor, z: Tensor) -> None:
    part = build(LoopGainSpec(form=form))
    assert part.weight.shape == (3, numbers)
    for loop, row in ((0, 0), (2, 2), (3, 2)):
        torch.testing.assert_close(part.leave(x, z, {}, loop), x + part.weight[row] * (z - x))


def test_gain_of_a_change_of_size_one(x: Tensor, z: Tensor) -> None:
    step = z - x
    expected = x + step / torch.sqrt(step.square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(build(LoopGainSpec(form="rms")).leave(x, z, {}, 1), expected)


@pytest.mark.parametrize("family", [LoopEmbeddingSpec, LoopNormSpec])
@pytest.mark.parametrize(("rows", "expected"), [(None, 3), (1, 1), (8, 8)])
def test_rows(family: type[LoopPart], rows: int | None, expected: int) -> None:
    assert build(family(rows=rows), loops=3).weight.shape == (expected, D)


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_reset_restores_the_start(spec: LoopPart) -> None:
    part, fresh = build(spec), build(spec, random=False)
    for module in part.modules():
        module.reset_parameters(Init(std=0.02))
    for name, value in fresh.state_dict().items():
        assert torch.equal(part.state_dict()[name], value), name


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_low_precision_states_keep_their_dtype(spec: LoopPart) -> None:
    part = build(spec)
    if hasattr(part, "proj"):
        part.proj.bfloat16()  # matrix products need one type; tables stay as they are
    x, z = torch.randn(2, 1, 2, D, dtype=torch.bfloat16)
    assert part.enter(x, {"x0": z}, 0).dtype == part.leave(x, z, {"x0": z}, 0).dtype == torch.bfloat16


def test_what_parts_multiply_with(x: Tensor, z: Tensor) -> None:
    """The state behind a part is what its scales make of it."""
    for spec, name, of in (
        (RecurrenceGateSpec(), "gate", lambda g: g * z + (1 - g) * x),
        (UpdateGateSpec(), "gate of the update", lambda g: x + g * (z - x)),
        (LoopGainSpec(form="scalar"), "gain", lambda g: x + g * (z - x)),
        (LoopGainSpec(form="channel"), "gain", lambda g: x + g * (z - x)),
        (LoopGainSpec(form="rms"), "gain", lambda g: x + g * (z - x)),
        (LoopNormSpec(), "gain of the norm", lambda g: g * z / torch.sqrt(z.square().mean(-1, keepdim=True) + 1e-6)),
    ):
        part = build(spec)
        for loop in (0, 1, 7):
            (found,) = part.scales(x, z, {}, loop).items()
            assert found[0] == name
            torch.testing.assert_close(of(found[1]), part.leave(x, z, {}, loop))
    assert build(InjectionSpec()).scales(x, z, {}, 0) == {}
