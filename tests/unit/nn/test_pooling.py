"""What each pooling sees of the state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ouroboros.config.parts.modulated import ControllerSpec
from ouroboros.nn.pooling import pooled
from ouroboros.nn.visit import VisitContext

T, D = 7, 6
NOWHERE = VisitContext(rotary=(torch.empty(0), torch.empty(0)))


def seen(pooling: Any, x: Tensor, visit: VisitContext = NOWHERE) -> Tensor:
    return pooled(x, visit, ControllerSpec(pooling=pooling, prompt=3))


@pytest.mark.parametrize(
    ("pooling", "changed"),
    [
        ("token", [False] * 4 + [True] + [False] * 2),
        ("prefix", [False] * 4 + [True] * 3),
        ("prompt", [False] * 7),
        ("all", [True]),
    ],
)
def test_what_a_pooling_sees_of_the_fifth_token(pooling: str, changed: list[bool]) -> None:
    x = torch.randn(1, T, D)
    other = x.clone()
    other[:, 4] += 1.0
    difference = (seen(pooling, other) - seen(pooling, x)).abs().amax((0, 2))
    assert [bool(gap > 1e-3) for gap in difference] == changed


def test_means() -> None:
    x = torch.randn(2, T, D)
    for t in range(T):
        torch.testing.assert_close(seen("prefix", x)[:, t], x[:, : t + 1].mean(1))
        torch.testing.assert_close(seen("prompt", x)[:, t], x[:, : min(t + 1, 3)].mean(1))
    torch.testing.assert_close(seen("all", x), x.mean(1, keepdim=True))


@pytest.mark.parametrize("pooling", ["prefix", "prompt", "all"])
def test_padding_does_not_count(pooling: str) -> None:
    x = torch.randn(1, T, D)
    padding, positions = torch.ones(1, T), torch.arange(T)[None] - 2
    padding[:, :2] = 0
    padded = seen(pooling, x, NOWHERE._replace(padding=padding, positions=positions.clamp(min=0)))
    alone = seen(pooling, x[:, 2:])
    torch.testing.assert_close(padded[:, -alone.shape[1] :], alone)
