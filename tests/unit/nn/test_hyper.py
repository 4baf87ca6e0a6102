"""Hyper-connections between loops, against a slow reference, one token at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ouroboros.config.part import build as build_part
from ouroboros.config.parts.loop import HyperSpec
from ouroboros.nn.hyper import HyperConnections

D, LOOPS, EPS = 6, 3, 1e-6


def build(streams: int, *, random: bool = True) -> HyperConnections:
    """The part, with random weights or as it starts."""
    part = build_part(HyperSpec(streams=streams), D, LOOPS, EPS)
    for parameter in part.parameters() if random else ():
        torch.nn.init.normal_(parameter, std=0.2)
    return part


def blocks(x: Tensor) -> Tensor:
    """What stands for the blocks of a loop."""
    return x + torch.tanh(x)


def run(part: HyperConnections, x: Tensor, loops: int) -> Tensor:
    """The segment, as the executor runs it."""
    carried = {"x0": x}
    for loop in range(loops):
        x = part.leave(x, blocks(part.enter(x, carried, loop)), carried, loop)
    return x


def reference(part: HyperConnections, x_D: Tensor, loops: int) -> Tensor:
    """The formula of the docstring for one token."""
    N = part.streams
    streams = [x_D] * N
    for loop in range(loops):
        at = min(loop, LOOPS - 1)
        z = blocks(x_D) + part.embedding[at]
        flat = torch.cat(streams)
        weights = part.gates[at](flat / (flat.square().sum() + EPS * len(flat)).sqrt())
        for i in range(N):
            share = torch.tensor((i + 1) / (N + 1))
            keep = torch.sigmoid(weights[i] + torch.logit(share))
            streams[i] = keep * streams[i] + 2 * torch.sigmoid(weights[N + i]) * z
        flat = torch.cat(streams)
        read = part.read[at](flat / (flat.square().sum() + EPS * len(flat)).sqrt())
        x_D = z + sum(read[i] * streams[i] for i in range(N))
    return x_D


@pytest.mark.parametrize("loops", [1, LOOPS, LOOPS + 2])
@pytest.mark.parametrize("streams", [1, 2, 4])
def test_formula(streams: int, loops: int) -> None:
    part, x = build(streams), torch.randn(2, 3, D)
    expected = torch.stack([torch.stack([reference(part, token, loops) for token in row]) for row in x])
    torch.testing.assert_close(run(part, x, loops), expected, rtol=1e-4, atol=1e-4)


def test_a_step_of_the_optimizer_moves_gates_little() -> None:
    """Also where the streams are long: AdamW moves every weight by the rate, and here all of them one way."""
    width, rate = 256, 0.01
    part = build_part(HyperSpec(streams=4), width, LOOPS, EPS)
    torch.nn.init.constant_(part.gates[0].weight, rate)
    logits = part.gates[0](part._normed(torch.ones(1, 4, width)))
    assert 0.1 < logits.abs().max() < 0.5


def test_neutral_at_the_start_and_alive() -> None:
    """Nothing learned is random at the start, but streams differ, and all weights move by the second step."""
    part, x = build(4, random=False), torch.randn(2, 4, D)
    carried = {"x0": x}
    z = blocks(x)
    assert part.leave(x, z, carried, 0) is not z and torch.equal(part.leave(x, z, carried, 0), z)
    streams = carried["hyper"]
    torch.testing.assert_close(streams[..., 1, :], 0.4 * x + z)
    for step in range(2):
        part.zero_grad()
        run(part, x, LOOPS).square().sum().backward()
        if step == 0:
            bias = part.read[0].bias.grad
            assert bias.all() and bias.unique().numel() == 4, "equal gradients would keep the streams equal"
        with torch.no_grad():
            for parameter in part.parameters():
                parameter -= 0.01 * parameter.grad
    assert all(parameter.grad.any() for parameter in part.parameters())


def test_parameters_are_counted_and_reset() -> None:
    part = build(3)
    assert sum(p.numel() for p in part.parameters()) == HyperSpec(streams=3).parameters(D, LOOPS)
    for module in (part, *part.gates, *part.read):
        module.reset_parameters()
    assert not any(p.any() for p in part.parameters())


def test_channels_of_a_stream_are_treated_alike() -> None:
    """A residual with several value channels gives states of (B, T, V, D)."""
    part, x = build(2), torch.randn(2, 3, 4, D)
    alone = torch.stack([run(part, x[:, :, channel], LOOPS) for channel in range(4)], dim=2)
    torch.testing.assert_close(run(part, x, LOOPS), alone, rtol=1e-4, atol=1e-4)


def test_low_precision_states_keep_their_dtype() -> None:
    assert run(build(2).bfloat16(), torch.randn(1, 2, D, dtype=torch.bfloat16), LOOPS).dtype == torch.bfloat16
