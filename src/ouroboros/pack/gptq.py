"""Codes that make up for each other's errors (GPTQ, Frantar et al. 2023, arXiv 2210.17323).

With ``E = W - Q`` and the second moment ``H = mean x x^T`` of a map's input, ``tr(E H E^T)`` is the mean squared error
of what the map computes. Columns are coded one after the other, and each one's error is made up for by those that
follow. Everything is float64, and the factor of ``H^-1`` comes from a triangular inverse and not from an inverted
matrix. Shapes: R rows (outputs), C columns (inputs), G groups of columns.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ouroboros.pack.quantize import rounded

ESCALATION = 10.0
MOST_DAMPING = 10.0


class Solved(NamedTuple):
    """Codes, and how they came about."""

    codes_RC: Tensor
    """int8."""
    damping: float
    """The share of the mean diagonal that was added; 0 for rounding."""
    escalations: tuple[str, ...] = ()
    """What had to be tried again."""
    fallback: str = ""
    """Why the codes are those of rounding; empty if they are not."""


def objective(w_RC: Tensor, dense_RC: Tensor, h_CC: Tensor) -> float:
    """``tr(E H E^T)``: the mean over positions of the squared error, summed over outputs."""
    error_RC = w_RC.double() - dense_RC.double()
    return float(((error_RC @ h_CC.double()) * error_RC).sum())


def solve(
    w_RC: Tensor,
    h_CC: Tensor,
    steps_RG: Tensor,
    bits: int,
    *,
    order: Literal["descending", "none"] = "descending",
    damping: float = 0.01,
    block: int = 128,
) -> Solved:
    """The codes of a matrix with given steps.

    A column whose input is always zero is rounded, as it neither needs help nor can help. If the damped ``H`` has no
    Cholesky factor, damping grows tenfold, and beyond ten times the mean diagonal all is rounded; both are reported.

    Args:
        w_RC: the matrix.
        h_CC: second moment of its input.
        steps_RG: steps of rows, or of groups of neighbouring columns.
        bits: of a code.
        order: columns by descending diagonal of ``h_CC``, which code large inputs while many can still make up for
            them; or as they are.
        damping: added to the diagonal, as a share of its mean.
        block: columns after which the rest of the matrix is updated; changes only the speed.
    """
    nearest = rounded(w_RC, steps_RG, bits)
    h_CC = h_CC.double()
    if not bool(h_CC.isfinite().all()):
        return Solved(nearest, 0.0, fallback="the second moment of its input is not finite")
    diagonal_C = h_CC.diagonal()
    if float(diagonal_C.max()) <= 0:
        return Solved(nearest, 0.0)  # where the input is always zero, no code is better than another
    picked = diagonal_C.argsort(descending=True, stable=True) if order == "descending" else torch.arange(len(h_CC))
    ordered_CC = h_CC[picked][:, picked]
    ordered_CC.diagonal()[ordered_CC.diagonal() <= 0] = 1.0
    escalations: list[str] = []
    while True:
        factor_CC = _factor(ordered_CC, damping * float(diagonal_C.mean()))
        if factor_CC is not None:
            break
        if damping * ESCALATION > MOST_DAMPING:
            return Solved(nearest, 0.0, tuple(escalations), "the second moment of its input has no Cholesky factor")
        damping *= ESCALATION
        escalations.append(f"damping raised to {damping:g}")
    steps_CR = steps_RG.double().repeat_interleave(w_RC.shape[1] // steps_RG.shape[1], dim=1).T[picked].contiguous()
    codes_CR = _columns(w_RC.double().T[picked].contiguous(), factor_CC, steps_CR, bits, block)
    codes_RC = torch.empty_like(nearest)
    codes_RC[:, picked] = codes_CR.T.to(torch.int8)
    return Solved(codes_RC, damping, tuple(escalations))


def _factor(h_CC: Tensor, added: float) -> Tensor | None:
    """The upper triangular ``U`` with ``U^T U = (H + added I)^-1``; None where that is not positive definite.

    With the axes reversed, ``H = V V^T`` for an upper triangular V, and ``U = V^-1``.
    """
    damped_CC = h_CC.clone()
    damped_CC.diagonal().add_(added)
    lower_CC, failed = torch.linalg.cholesky_ex(damped_CC.flip(0, 1))
    if bool(failed) or not bool(lower_CC.isfinite().all()):
        return None
    eye_CC = torch.eye(len(h_CC), dtype=h_CC.dtype)
    return torch.linalg.solve_triangular(lower_CC.flip(0, 1), eye_CC, upper=True)


def _columns(w_CR: Tensor, factor_CC: Tensor, steps_CR: Tensor, bits: int, block: int) -> Tensor:
    """Codes (C, R) of the columns of a matrix, coded in their order; ``w_CR`` is overwritten."""
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes_CR = torch.empty_like(w_CR)
    for start in range(0, len(w_CR), block):
        stop = min(start + block, len(w_CR))
        errors_BR = torch.empty_like(w_CR[start:stop])
        for column in range(start, stop):
            code_R = (w_CR[column] / steps_CR[column]).round_().clamp_(lowest, highest)
            codes_CR[column] = code_R
            error_R = (w_CR[column] - code_R * steps_CR[column]) / factor_CC[column, column]
            w_CR[column + 1 : stop].addr_(factor_CC[column, column + 1 : stop], error_R, alpha=-1)
            errors_BR[column - start] = error_R
        w_CR[stop:].addmm_(factor_CC[start:stop, stop:].T, errors_BR, alpha=-1)
    return codes_CR
