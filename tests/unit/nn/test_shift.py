"""Mixing a projection with the previous token's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ouroboros.nn.shift import TokenShift

D, K, C, T = 6, 2, 3, 5


class Kept:
    """A memory that keeps what came before."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def extend(self, k_BKTC: Tensor, v_BKTC: Tensor) -> Any:
        raise AssertionError("a shift extends no keys")

    def recent(self, name: str, x: Tensor, count: int) -> Tensor:
        before = self.kept.get(name, x.new_zeros(x.shape[0], count, *x.shape[2:]))
        longer = torch.cat((before, x), dim=1)
        self.kept[name] = longer[:, -count:]
        return longer


def inputs(batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, T, K, C), torch.randn(batch, T, D)


def test_formula() -> None:
    layer, (u, x) = TokenShift(D, K), inputs()
    y = layer(u, x, None, None, "u")
    for t in range(T):
        for head in range(K):
            a = torch.sigmoid(x[:, t] @ layer.proj.weight[head])[:, None]
            expected = (1 - a) * u[:, t, head] + (a * u[:, t - 1, head] if t else 0)
            torch.testing.assert_close(y[:, t, head], expected)


def test_a_single_token_is_mixed_with_nothing() -> None:
    layer, (u, x) = TokenShift(D, K), inputs()
    one = layer(u[:, :1], x[:, :1], None, None, "u")
    torch.testing.assert_close(one, layer(u, x, None, None, "u")[:, :1])
    assert not torch.allclose(one, u[:, :1])


def test_pieces_with_a_memory_are_the_whole() -> None:
    layer, (u, x) = TokenShift(D, K), inputs()
    whole, memory, other = layer(u, x, None, None, "u"), Kept(), torch.randn(2, 3, K, C)
    pieces = []
    for at, end in ((0, 1), (1, 3), (3, 5)):
        layer(other[:, :1], x[:, :1], memory, None, "another use")
        pieces.append(layer(u[:, at:end], x[:, at:end], memory, None, "u"))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)


def test_padding_counts_as_zero() -> None:
    layer, (u, x) = TokenShift(D, K), inputs(1)
    alone = layer(u[:, 2:], x[:, 2:], None, None, "u")
    padding = torch.tensor([[0, 0, 1, 1, 1]])
    torch.testing.assert_close(layer(u, x, None, padding, "u")[:, 2:], alone)
    assert not torch.allclose(layer(u, x, None, None, "u")[:, 2:], alone)
