"""Bases of removed layers: the best low-rank approximation, with all of the size in B."""

from __future__ import annotations

import pytest
import torch

from ouroboros.convert.bases import mean_residual, truncated
from ouroboros.errors import OuroborosError


def test_mean_residual() -> None:
    kept, one, two = torch.randn(3, 4, 5).bfloat16()
    expected = ((one.float() - kept.float()) + (two.float() - kept.float())) / 2
    torch.testing.assert_close(mean_residual([one, two], kept), expected)
    with pytest.raises(OuroborosError, match="none is: keep fewer layers"):
        mean_residual([], kept)


def test_no_other_matrix_of_the_rank_is_nearer() -> None:
    matrix = torch.randn(7, 5)
    A, B = truncated(matrix, 2)
    torch.testing.assert_close(A @ A.T, torch.eye(2), atol=1e-5, rtol=0)
    sigma = torch.linalg.svdvals(matrix)
    torch.testing.assert_close((matrix - B @ A).norm(), sigma[2:].norm())
    torch.testing.assert_close(B.norm(dim=0), sigma[:2])


@pytest.mark.parametrize("shape", [(7, 3), (3, 7)])
def test_surplus_rank_is_zero(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    A, B = truncated(matrix, 5)
    assert A.shape == (5, shape[1]) and B.shape == (shape[0], 5)
    assert not A[3:].any() and not B[:, 3:].any()
    torch.testing.assert_close(B @ A, matrix, atol=1e-5, rtol=1e-5)
