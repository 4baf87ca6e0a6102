"""Low-rank bases of what removed layers would have added to the layer that stays (Controller, section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ouroboros.errors import check


class Bases(NamedTuple):
    """Factors of a low-rank matrix ``B A``."""

    A: Tensor
    """(rank, inputs): orthonormal rows."""
    B: Tensor
    """(outputs, rank): orthogonal columns, as long as the singular values."""


def mean_residual(removed: Sequence[Tensor], kept: Tensor) -> Tensor:
    """The mean over removed layers of ``W_l - W_kept``, (outputs, inputs) in float32.

    Raises:
        OuroborosError: no layer is removed, so there is nothing to make bases of.
    """
    check(bool(removed), "bases are made of removed layers, and none is: keep fewer layers")
    return torch.stack([weight.float() - kept.float() for weight in removed]).mean(0)


@torch.no_grad()
def truncated(matrix: Tensor, rank: int) -> Bases:
    """The best approximation of ``matrix`` (outputs, inputs) by one of ``rank``: leading right singular vectors in A,
    left ones times their singular values in B. Where ``rank`` is above the smaller side, the rest is zero."""
    U, sigma, Vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    k = min(rank, len(sigma))
    A, B = matrix.new_zeros(rank, matrix.shape[1]).float(), matrix.new_zeros(matrix.shape[0], rank).float()
    A[:k], B[:, :k] = Vh[:k], U[:, :k] * sigma[:k]
    return Bases(A, B)
