"""Streaming ridge regression: an affine map fitted in closed form to pairs that never are in memory at once.

Shapes: N pairs, I inputs, O outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ouroboros.errors import check


class Affine(NamedTuple):
    """``y = W x + b``."""

    weight: Tensor
    """(O, I), float32."""
    bias: Tensor
    """(O,), float32."""

    def __call__(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        return torch.nn.functional.linear(x, self.weight, self.bias)


class Ridge:
    """The sums that a ridge regression of ``y`` on ``x`` needs, in float64, of any number of pairs.

    Args:
        inputs, outputs: channels of x and y.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        self.pairs = 0
        self.count = 0.0
        self.sum_yy = 0.0
        self.sum_x = torch.zeros(inputs, dtype=torch.float64)
        self.sum_y = torch.zeros(outputs, dtype=torch.float64)
        self.sum_xx = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.sum_xy = torch.zeros(inputs, outputs, dtype=torch.float64)

    def add(self, x_NI: Tensor, y_NO: Tensor, weight_N: Tensor) -> None:
        """Add pairs, each of which counts as many times as its weight says.

        Raises:
            OuroborosError: a number is not finite.
        """
        check(bool(x_NI.isfinite().all() and y_NO.isfinite().all()), "states to fit a map to hold NaN or infinity")
        x, y, w = (part.double().cpu() for part in (x_NI, y_NO, weight_N[:, None]))
        self.pairs += len(x)
        self.count += w.sum().item()
        self.sum_yy += (w * y * y).sum().item()
        self.sum_x += (w * x).sum(0)
        self.sum_y += (w * y).sum(0)
        self.sum_xx += (w * x).T @ x
        self.sum_xy += (w * x).T @ y

    def merge(self, other: Ridge) -> None:
        """Add all pairs of another one."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def squares(self, affine: Affine) -> float:
        """The weighted sum over the pairs of ``|y - W x - b|^2``."""
        W, b = affine.weight.double().T, affine.bias.double()
        fitted = (W * (self.sum_xx @ W)).sum() + 2 * (self.sum_x @ W) @ b + self.count * b @ b
        crossed = (W * self.sum_xy).sum() + b @ self.sum_y
        return float(self.sum_yy + fitted - 2 * crossed)

    def solve(self, penalty: float) -> Affine:
        """The map that minimises ``sum w |y - W x - b|^2 + penalty * s * |W|^2``, where s is the mean over the inputs
        of their variance, times the sum of the weights; b is not penalised.

        Raises:
            OuroborosError: there is no pair, or the penalty is not positive.
        """
        check(self.count > 0, "no pairs of states to fit a map to: give more text")
        check(penalty > 0, f"the ridge penalty must be > 0, got {penalty}")
        mean_x, mean_y = self.sum_x / self.count, self.sum_y / self.count
        covariance = self.sum_xx - self.count * torch.outer(mean_x, mean_x)
        crossed = self.sum_xy - self.count * torch.outer(mean_x, mean_y)
        covariance.diagonal().add_(penalty * covariance.diagonal().mean())
        factor = torch.linalg.cholesky(covariance)
        weight_IO = torch.cholesky_solve(crossed, factor)
        return Affine(weight_IO.T.float().contiguous(), (mean_y - mean_x @ weight_IO).float())
