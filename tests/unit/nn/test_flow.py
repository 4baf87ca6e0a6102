"""Loop parts that hand something from loop to loop, against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ouroboros.config import LoopPart
from ouroboros.config.part import build as build_part
from ouroboros.config.parts.loop import AnchorSpec, ContractiveStepSpec, FlowSpec, LoopSmearSpec
from ouroboros.nn.part import Init, LoopModule, Started

D, LOOPS = 6, 3
EVERY = [FlowSpec(rank=2), LoopSmearSpec(), LoopSmearSpec(start=-1.0), AnchorSpec(width=4)]


def build(spec: LoopPart, *, random: bool = True) -> LoopModule:
    """A loop part, with random weights or as it starts."""
    part = build_part(spec, D, LOOPS, 1e-6)
    for parameter in part.parameters() if random else ():
        torch.nn.init.normal_(parameter)
    return part


def blocks(x: Tensor) -> Tensor:
    """What stands for the blocks of a loop."""
    return x + torch.sin(2 * x)


def run(parts: list[LoopModule], x: Tensor, loops: int) -> Tensor:
    """The segment, as the executor runs it."""
    carried = {"x0": x}
    for loop in range(loops):
        entered = x
        for part in parts:
            entered = part.enter(entered, carried, loop)
        z = blocks(entered)
        for part in parts:
            z = part.leave(x, z, carried, loop)
        x = z
    return x


@pytest.mark.parametrize("loops", [1, LOOPS, LOOPS + 2])
def test_the_order_of_the_published_crawler(loops: int) -> None:
    """Instructions of the state alone; smear before the anchor is written; what is handed on is not damped."""
    flow, smear, anchor = map(build, (FlowSpec(rank=2), LoopSmearSpec(), AnchorSpec(width=4)))
    contractive, step = build(ContractiveStepSpec(step=0.3)), 0.3
    g, u = torch.sigmoid(smear.gate), torch.randn(2, 4, D)
    x, previous, a = u, u, None
    for loop in range(loops):
        last = min(loop, LOOPS - 1)
        z = x + x @ flow.down.weight.T @ flow.up[last].weight.T
        if a is not None:
            z = z + a @ anchor.read[min(loop, LOOPS - 1) - 1].weight.T
        z = blocks(z)
        z = (1 - g) * z + g * previous
        a = z @ anchor.write[min(loop, LOOPS - 2)].weight.T
        previous, x = z, (1 - step) * x + step * z
    torch.testing.assert_close(run([flow, smear, anchor, contractive], u, loops), x)


@pytest.mark.parametrize("spec", [part for kind in EVERY for part in kind.neutral()], ids=str)
def test_neutral_at_the_start_and_alive(spec: LoopPart) -> None:
    """The factor that is zero learns from the first step, and the others from the second."""
    part, x = build(spec, random=False), torch.randn(2, 4, D)
    y = run([part], x, LOOPS)
    assert torch.equal(y, run([], x, LOOPS))
    for _ in range(2):
        y = run([part], x, LOOPS)
        part.zero_grad()
        y.square().sum().backward()
        with torch.no_grad():
            for parameter in part.parameters():
                parameter -= 0.1 * parameter.grad
    assert all(parameter.grad.any() for parameter in part.parameters())


def test_smear_starts_where_it_is_told() -> None:
    x, z = torch.randn(2, 2, 4, D)
    equal = build(LoopSmearSpec(), random=False)
    torch.testing.assert_close(equal.leave(x, z, {"x0": x}, 0), (x + z) / 2)
    almost = build(LoopSmearSpec(start=-20.0), random=False)
    torch.testing.assert_close(almost.leave(x, z, {"x0": x}, 0), z, rtol=0, atol=1e-6)


def test_instructions_start_small_whatever_the_model() -> None:
    part = build_part(FlowSpec(rank=64), 512, 1, 1e-6)
    assert part.down.weight.std().item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_parameters_are_counted_and_reset(spec: LoopPart) -> None:
    part = build(spec)
    assert sum(p.numel() for p in part.parameters()) == spec.parameters(D, LOOPS)
    fresh = build(spec, random=False)
    for module in part.modules():
        if isinstance(module, Started):
            module.reset_parameters(Init(std=0.02))
    for name, value in part.named_parameters():
        drawn = name.startswith(("down.", "write."))
        assert drawn or torch.equal(value, fresh.get_parameter(name)), name


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_low_precision_states_keep_their_dtype(spec: LoopPart) -> None:
    part = build(spec).bfloat16()
    assert run([part], torch.randn(1, 2, D, dtype=torch.bfloat16), LOOPS).dtype == torch.bfloat16
