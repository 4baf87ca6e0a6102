"""Ridge regression from sums, against the plain formula on all pairs at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ouroboros.convert.ridge import Affine, Ridge
from ouroboros.errors import OuroborosError


def pairs(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator) + 3
    y = x @ torch.randn(5, 3, generator=generator) + torch.randn(count, 3, generator=generator)
    return x, y, torch.rand(count, generator=generator) + 0.1


def reference(x: Tensor, y: Tensor, w: Tensor, penalty: float) -> Affine:
    """Gradient of the weighted squares set to zero, with the mean as a column of ones that is not penalised."""
    x, y, w = x.double(), y.double(), w.double()
    ones = torch.cat((x, torch.ones(len(x), 1, dtype=torch.float64)), 1)
    mean = (w[:, None] * x).sum(0) / w.sum()
    scale = (w[:, None] * (x - mean) ** 2).sum(0).mean()
    ridge = torch.diag(torch.tensor([penalty * scale] * x.shape[1] + [0.0], dtype=torch.float64))
    found = torch.linalg.solve(ones.T @ (w[:, None] * ones) + ridge, ones.T @ (w[:, None] * y))
    return Affine(found[:-1].T.float(), found[-1].float())


@pytest.mark.parametrize("penalty", [1e-3, 0.5])
def test_streamed_sums_give_the_weighted_ridge_regression(penalty: float) -> None:
    x, y, w = pairs(60)
    ridge, rest = Ridge(5, 3), Ridge(5, 3)
    for part in (slice(0, 20), slice(20, 41)):
        ridge.add(x[part], y[part], w[part])
    rest.add(x[41:], y[41:], w[41:])
    ridge.merge(rest)
    found, wanted = ridge.solve(penalty), reference(x, y, w, penalty)
    torch.testing.assert_close(found.weight, wanted.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.bias, wanted.bias, rtol=1e-4, atol=1e-4)
    squares = (w * (found(x) - y).square().sum(-1)).sum()
    assert ridge.pairs == 60 and ridge.squares(found) == pytest.approx(squares.item(), rel=1e-4)


def test_what_cannot_be_fitted_is_refused() -> None:
    x, y, w = pairs(4)
    with pytest.raises(OuroborosError, match="more text"):
        Ridge(5, 3).solve(1.0)
    ridge = Ridge(5, 3)
    ridge.add(x, y, w)
    with pytest.raises(OuroborosError, match="penalty"):
        ridge.solve(0.0)
    with pytest.raises(OuroborosError, match="NaN or infinity"):
        ridge.add(x * float("nan"), y, w)
