"""Low-rank bases of what removed layers would have added to the layer that stays (Controller, section 2.2)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ouroboros.convert.layers import LAYER, Layers, groups, removed
from ouroboros.errors import check
from ouroboros.schedule import Schedule

Kind = Literal["mean", "joint", "stepwise"]
"""What bases span: the ``mean`` of the residuals of all removed layers, as published; their variation (``joint``); or,
in each loop, the mean residual of one group of removed layers (``stepwise``)."""

_NUMBER = re.compile(re.escape(LAYER) + r"(\d+)\.")
_BASES = re.compile(re.escape(LAYER) + r"(?P<block>\d+)\.(?P<layer>\w+)\.bases\.(?P<target>\w+)\.(?:(?P<loop>\d+)\.)?A")
"""The name of A of a modulated map."""


class Bases(NamedTuple):
    """Factors of a low-rank matrix ``B A``, or of matrices ``B M A`` with any core M."""

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
    return _filled(Vh, U * sigma, rank)


@torch.no_grad()
def joint(removed: Sequence[Tensor], kept: Tensor, rank: int) -> Bases:
    """Bases of all residuals ``W_l - W_kept`` at once: A are leading right singular vectors of the residuals stacked on
    one another, B leading left ones of the residuals side by side. Each column of B is as long as its singular value
    divided by the square root of the number of layers.

    A column of B and the row of A of the same number do not belong together as in :func:`truncated`: such bases want a
    full core, and the best one for each layer is :func:`best_core`. The vectors are those of Gram matrices, which are
    summed in float64, so that no more than one residual is held.

    Raises:
        OuroborosError: no layer is removed, so there is nothing to make bases of.
    """
    check(bool(removed), "bases are made of removed layers, and none is: keep fewer layers")
    outputs, inputs = kept.shape
    left, right = (torch.zeros(size, size, dtype=torch.float64, device=kept.device) for size in (outputs, inputs))
    for weight in removed:
        residual = weight.double() - kept.double()
        left.addmm_(residual, residual.T)
        right.addmm_(residual.T, residual)
    # Eigenvalues come in rising order.
    values, U = (found.flip(-1) for found in torch.linalg.eigh(left))
    V = torch.linalg.eigh(right).eigenvectors.flip(-1)
    lengths = (values.clamp(min=0) / len(removed)).sqrt()
    # Vectors beyond these belong to no residual.
    of_A, of_B = min(inputs, outputs * len(removed)), min(outputs, inputs * len(removed))
    return _filled(V.T[:of_A].float(), (U * lengths)[:, :of_B].float(), rank)


@torch.no_grad()
def best_core(bases: Bases, residual: Tensor) -> Tensor:
    """The core M (rank, rank) for which ``B M A`` is nearest to ``residual`` (outputs, inputs), by least squares."""
    return torch.linalg.pinv(bases.B) @ residual.float() @ torch.linalg.pinv(bases.A)


def _filled(rows: Tensor, columns: Tensor, rank: int) -> Bases:
    """The first ``rank`` rows and columns, with zeros for those that are missing."""
    A, B = rows.new_zeros(rank, rows.shape[1]), columns.new_zeros(columns.shape[0], rank)
    A[: len(rows)], B[:, : columns.shape[1]] = rows[:rank], columns[:, :rank]
    return Bases(A, B)


def bases_of(
    places: Mapping[str, Tensor], donor: Mapping[str, Tensor], schedule: Schedule, kept: Layers, kind: Kind = "mean"
) -> dict[str, Tensor]:
    """A and B of every modulated map of a model, of the residuals of the donor's removed layers.

    Removed are the layers that are no block by themselves (:func:`~ouroboros.convert.layers.removed`). Each looped
    block is compared with all of them; ``stepwise`` cuts them into as many groups of neighbours as the loops have
    visits, and each visit of a block is compared with its group, in order.

    Args:
        places: the model's state, whose modulated maps are told by their names and shapes.
        donor: the donor's tensors in our names.
        schedule: of the model.
        kept: the donor's layers that each block is made of.
        kind: see :data:`Kind`. With ``stepwise`` the modulated maps have to have bases for each loop.

    Raises:
        OuroborosError: no layer is removed, or those that are have the looped block as their mean.
    """
    targets = [match for name in places if (match := _BASES.fullmatch(name)) is not None]
    numbers = sorted({int(match["block"]) for match in targets})
    gone = removed(kept, 1 + max(int(match[1]) for name in donor if (match := _NUMBER.match(name)) is not None))
    check(bool(gone), "bases are made of removed layers, and none is: keep fewer layers")
    for number in numbers if kind == "mean" else ():
        check(
            {*kept[number]} != {*gone},
            f"block {number} is the mean of all removed layers, so the mean of what they differ in is zero: choose"
            " joint or stepwise bases",
        )
    visits = [(visit.block, visit.loop) for visit in schedule.visits if visit.block in numbers]
    of_visit = dict(zip(visits, groups(gone, len(visits)), strict=True))
    found: dict[str, Tensor] = {}
    for match in targets:
        block, loop = int(match["block"]), int(match["loop"] or 0)
        weight = f"{match['layer']}.{match['target']}.weight"
        base = torch.stack([donor[f"{LAYER}{layer}.{weight}"].float() for layer in kept[block]]).mean(0)
        layers = of_visit[block, loop] if kind == "stepwise" else gone
        others, rank = [donor[f"{LAYER}{layer}.{weight}"] for layer in layers], len(places[match[0]])
        made = joint(others, base, rank) if kind == "joint" else truncated(mean_residual(others, base), rank)
        found |= {f"{match[0].removesuffix('A')}{name}": factor for name, factor in made._asdict().items()}
    return found
