"""A tensor as whole multiples of steps: what quantisers make, codecs store and artifacts hold.

Shapes: R rows, C columns, G groups of neighbouring columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ouroboros.errors import check


@dataclass(frozen=True, kw_only=True, eq=False)
class Coded:
    """Codes and their steps. A tensor of more than two dimensions has its first one as rows; a vector is one row."""

    codes: Tensor
    """(R, C) int8, within ``[-2^(bits - 1), 2^(bits - 1) - 1]``."""
    scales: Tensor
    """(R, G) float16: the step of each row, or of each group of ``C / G`` columns of it."""
    bits: int
    shape: tuple[int, ...]
    """Of the tensor that it stands for."""

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        groups = self.scales.shape[1]
        check(2 <= self.bits <= 8, f"codes have 2 to 8 bits, got {self.bits}")
        check(self.codes.dtype == torch.int8, f"codes are int8, got {self.codes.dtype}")
        check(self.scales.dtype == torch.float16, f"scales are float16, got {self.scales.dtype}")
        check(
            len(self.scales) == rows and groups > 0 and columns % groups == 0,
            f"scales of shape {tuple(self.scales.shape)} do not fit codes of shape {(rows, columns)}",
        )
        check(torch.Size(self.shape).numel() == rows * columns, f"codes of {rows} x {columns} do not fit {self.shape}")

    def steps(self) -> Tensor:
        """The step of each code, (R, C) float32."""
        return self.scales.float().repeat_interleave(self.codes.shape[1] // self.scales.shape[1], dim=1)

    def dense(self) -> Tensor:
        """The tensor itself, float32."""
        return (self.codes.float() * self.steps()).reshape(self.shape)
