"""Bases of removed layers: the best low-rank approximation, with all of the size in B."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ouroboros.convert.bases import bases_of, best_core, joint, mean_residual, truncated
from ouroboros.convert.layers import Layers
from ouroboros.errors import OuroborosError
from ouroboros.schedule import parse


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


def low(rank: int, outputs: int, inputs: int, layers: int) -> list[Tensor]:
    """Matrices that share a row space and a column space of this many dimensions."""
    left, right = torch.randn(outputs, rank), torch.randn(rank, inputs)
    return [left @ torch.randn(rank, rank) @ right for _ in range(layers)]


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_joint_bases_span_every_residual(shape: tuple[int, int]) -> None:
    """With the best cores they give residuals back whose spaces they hold, which bases of the mean do not."""
    kept, residuals = torch.randn(shape), low(2, *shape, layers=3)
    made = joint([kept + residual for residual in residuals], kept, 2)
    torch.testing.assert_close(made.A @ made.A.T, torch.eye(2), atol=1e-5, rtol=0)
    lengths = made.B.T @ made.B
    torch.testing.assert_close(lengths, lengths.diag().diag(), atol=1e-4, rtol=0)
    torch.testing.assert_close(lengths.trace(), torch.stack(residuals).square().sum() / 3)
    for residual in residuals:
        core = best_core(made, residual)
        torch.testing.assert_close(made.B @ core @ made.A, residual, atol=1e-4, rtol=1e-4)
    opposite = joint([kept + residuals[0], kept - residuals[0]], kept, 2)
    torch.testing.assert_close(
        opposite.B @ best_core(opposite, residuals[0]) @ opposite.A, residuals[0], atol=1e-4, rtol=1e-4
    )
    assert mean_residual([kept + residuals[0], kept - residuals[0]], kept).abs().max() < 1e-5


def test_no_other_core_is_nearer() -> None:
    kept, residual = torch.randn(7, 5), torch.randn(7, 5)
    made = joint([kept + residual, kept + torch.randn(7, 5)], kept, 3)
    best = best_core(made, residual)
    error = (made.B @ best @ made.A - residual).norm()
    for _ in range(5):
        assert (made.B @ (best + 0.1 * torch.randn(3, 3)) @ made.A - residual).norm() > error


def test_joint_bases_of_one_layer_are_those_of_its_residual() -> None:
    kept, other = torch.randn(2, 7, 5)
    made, expected = joint([other], kept, 3), truncated(other - kept, 3)
    torch.testing.assert_close(made.A.abs(), expected.A.abs(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(made.B.abs(), expected.B.abs(), atol=1e-4, rtol=1e-4)


def test_surplus_rank_of_joint_bases_is_zero() -> None:
    made = joint(list(torch.randn(2, 3, 7)), torch.randn(3, 7), 9)
    assert made.A.shape == (9, 7) and made.B.shape == (3, 9)
    assert made.A[5].any() and not made.A[6:].any() and made.B[:, 2].any() and not made.B[:, 3:].any()
    with pytest.raises(OuroborosError, match="none is: keep fewer layers"):
        joint([], torch.randn(3, 7), 2)


NAME = "model.decoder.layers.{}.mlp.up_proj.weight"
DONOR = {NAME.format(layer): torch.randn(6, 4) for layer in range(9)}


def places(*blocks: int, loops: int | None = None) -> dict[str, Tensor]:
    """The state of a model whose blocks of these numbers are modulated in one map, with rank 2."""
    middle = [""] if loops is None else [f"{loop}." for loop in range(loops)]
    names = [f"model.decoder.layers.{block}.mlp.bases.up_proj.{loop}" for block in blocks for loop in middle]
    return {f"{name}{factor}": torch.zeros(2, 2) for name in names for factor in "AB"}


def product(found: dict[str, Tensor], block: int, loop: str = "") -> Tensor:
    prefix = f"model.decoder.layers.{block}.mlp.bases.up_proj.{loop}"
    return found[f"{prefix}B"] @ found[f"{prefix}A"]


def expected(kept: list[int], layers: list[int]) -> Tensor:
    base = torch.stack([DONOR[NAME.format(layer)] for layer in kept]).mean(0)
    made = truncated(mean_residual([DONOR[NAME.format(layer)] for layer in layers], base), 2)
    return made.B @ made.A


def test_bases_of_several_looped_layers_are_of_all_that_is_removed() -> None:
    kept: Layers = ((0,), (3,), (6,), (8,))
    found = bases_of(places(1, 2), DONOR, parse("1 (2)x2 1"), kept)
    assert found.keys() == places(1, 2).keys()
    for block, layer in ((1, 3), (2, 6)):
        torch.testing.assert_close(product(found, block), expected([layer], [1, 2, 4, 5, 7]))


def test_stepwise_bases_are_of_one_group_for_each_visit() -> None:
    kept: Layers = ((0,), (3,), (6,), (8,))
    found = bases_of(places(1, 2, loops=2), DONOR, parse("1 (2)x2 1"), kept, "stepwise")
    groups = {(1, 0): [1], (2, 0): [2], (1, 1): [4], (2, 1): [5, 7]}
    for (block, loop), layers in groups.items():
        torch.testing.assert_close(product(found, block, f"{loop}."), expected([3 * block], layers))
    many = bases_of(places(1, loops=12), DONOR, parse("1 (1)x12 1"), ((0,), (4,), (8,)), "stepwise")
    torch.testing.assert_close(product(many, 1, "0."), expected([4], [1]))
    torch.testing.assert_close(product(many, 1, "11."), expected([4], [7]))


def test_bases_of_a_mean() -> None:
    """The layers of a mean are removed ones; the mean of what they differ from it in is zero."""
    kept: Layers = ((0,), tuple(range(1, 8)), (8,))
    stepwise = bases_of(places(1, loops=2), DONOR, parse("1 (1)x2 1"), kept, "stepwise")
    torch.testing.assert_close(product(stepwise, 1, "0."), expected([*range(1, 8)], [1, 2, 3]))
    assert product(bases_of(places(1), DONOR, parse("1 (1)x2 1"), kept, "joint"), 1).abs().max() > 0.1
    with pytest.raises(OuroborosError, match="block 1 is the mean of all removed layers.*choose joint or stepwise"):
        bases_of(places(1), DONOR, parse("1 (1)x2 1"), kept)
    with pytest.raises(OuroborosError, match="none is: keep fewer layers"):
        bases_of(places(1), DONOR, parse("1 (7)x2 1"), tuple((layer,) for layer in range(9)))
