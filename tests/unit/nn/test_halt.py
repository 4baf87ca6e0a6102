"""Halting against a loop over tokens that is written down as the paper says it."""

from __future__ import annotations

import pytest
import torch

from ouroboros.config.parts.halt import HaltSpec
from ouroboros.nn.halt import Halt, weigh

D = 5


def test_weights_of_a_token() -> None:
    """0.3 and 0.4 count, 0.5 gets the rest of 0.3, and what comes later nothing."""
    total, weights = torch.zeros(1), []
    for p in (0.3, 0.4, 0.5, 0.9):
        weight, total = weigh(torch.tensor([p]), total)
        weights.append(float(weight))
    assert weights == pytest.approx([0.3, 0.4, 0.3, 0.0]) and float(total) == 1


@pytest.mark.parametrize("bias", [-4.0, -2.0, 3.0])
def test_a_constant_probability_gives_a_mean_with_weights_that_add_up_to_one(bias: float) -> None:
    halt, states = Halt(HaltSpec(hidden=3, bias=bias), D, 12, 1e-6), torch.randn(12, 2, 4, D)
    carried: dict[str, torch.Tensor] = {}
    for loop, state in enumerate(states):
        assert halt.leave(states[0], state, carried, loop) is state
    p, weights = 1 / (1 + 2.718281828**-bias), []
    while sum(weights) + p < 1 and len(weights) < 12:
        weights.append(p)
    index = min(len(weights), 11)
    expected = torch.einsum("l,lbtd->btd", torch.tensor(weights), states[: len(weights)])
    expected = expected + (1 - sum(weights)) * states[index]
    torch.testing.assert_close(halt.finish(states[-1], carried), expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_probability() -> None:
    halt = Halt(HaltSpec(hidden=3), D, 2, 1e-6)
    carried: dict[str, torch.Tensor] = {}
    for loop in range(2):
        z = halt.leave(torch.randn(1, 3, D), torch.randn(1, 3, D), carried, loop)
    halt.finish(z, carried).sum().backward()
    assert halt.last.weight.grad is not None and halt.last.weight.grad.any()
