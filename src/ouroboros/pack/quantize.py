"""Weights as codes: how large the steps are, and rounding to them.

The steps are rounded to float16 before anything is coded with them, so what rounding a step itself costs is part of
every comparison. A vector is one row; of a tensor of more dimensions, the first is the rows. Shapes: R rows, C columns,
G groups of neighbouring columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ouroboros.errors import check
from ouroboros.nn.quantize import codes, row_steps
from ouroboros.pack.coded import Coded

SMALLEST, LARGEST = 2.0**-24, 65504.0
"""The range of a positive float16."""
FRACTIONS = [1.0 - 0.025 * number for number in range(33)]
"""Of the largest weight, tried by ``squares``: two bits want a fifth of it, eight bits nearly all."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Which weight the largest code stands for, ``c``; a step is ``c / (2^(bits - 1) - 1)``, and larger weights are
    clipped."""

    by: Literal["quantile", "squares", "sigma", "size"] = "squares"
    """``quantile``: ``c`` is a quantile of the row's absolute weights. ``squares``: the part of the largest with which
    rounding has the least squared error. ``sigma``: a multiple of the row's root mean square, so that codes of every
    row are distributed alike, which an entropy coder rewards. ``size``: the same with the multiple, one for the tensor,
    for which the codes' order-0 entropy is as asked."""
    value: float | None = None
    """``quantile``: which one, in (0, 1]. ``sigma``: the multiple, above 0. ``size``: bits per weight, above 0."""

    def __post_init__(self) -> None:
        value = self.value
        if self.by == "squares":
            check(value is None, f"clip squares takes no value, got {value}")
            return
        check(value is not None and value > 0, f"clip {self.by} needs a value above 0, got {value}")
        check(self.by != "quantile" or (value or 0) <= 1, f"clip quantile needs a value up to 1, got {value}")


SQUARES = Clip()
"""The clip that needs no choice."""


def matrix_of(w: Tensor) -> Tensor:
    """``w`` as rows and columns (R, C), float32."""
    return w.detach().float().reshape((w.shape[0], -1) if w.ndim > 1 else (1, -1))


def checked(w: Tensor, name: str) -> Tensor:
    """``w``, if it can be quantised.

    Raises:
        OuroborosError: it is empty, or holds NaN or infinity.
    """
    check(w.numel() > 0, f"tensor {name!r} is empty: keep it as float16")
    check(bool(w.isfinite().all()), f"tensor {name!r} holds NaN or infinity, and there are no codes for these")
    return w


def choose_steps(w_RC: Tensor, bits: int, *, group: int = 0, clip: Clip = SQUARES, name: str = "weight") -> Tensor:
    """The steps of a matrix, (R, G) float16.

    A step is never below 2^-24, the smallest float16; there is no other floor, so tiny weights get tiny steps.

    Args:
        w_RC: the matrix.
        bits: of a code, 2 to 8.
        group: columns that share a step; 0: all columns of a row.
        clip: see :class:`Clip`.
        name: of the tensor, for messages.

    Raises:
        OuroborosError: NaN or infinity, columns that are not whole groups, or weights too large for float16 steps.
    """
    checked(w_RC, name)
    rows, columns = w_RC.shape
    check(2 <= bits <= 8, f"tensor {name!r}: codes have 2 to 8 bits, got {bits}")
    check(
        group >= 0 and columns % (group or columns) == 0,
        f"tensor {name!r} has {columns} columns, which groups of {group} do not divide: choose another group, or 0",
    )
    w_NC = w_RC.float().reshape(-1, group or columns)
    if clip.by == "quantile":
        step_N1 = row_steps(w_NC, bits, clip=clip.value or 1.0)
    elif clip.by == "squares":
        step_N1 = _least_squares(w_NC, bits)
    else:
        size_N1 = w_NC.double().square().mean(dim=1, keepdim=True).sqrt().float()
        multiple = clip.value if clip.by == "sigma" else _multiple(w_NC, size_N1, bits, clip.value or 1.0)
        step_N1 = size_N1 * (multiple or 1.0) / (2 ** (bits - 1) - 1)
    fits = float(step_N1.max()) <= LARGEST
    check(fits, f"tensor {name!r} has weights too large for a step in float16: keep it as float32")
    return _stored(step_N1).reshape(rows, -1)


def rounded(w_RC: Tensor, steps_RG: Tensor, bits: int) -> Tensor:
    """The nearest codes (R, C), int8, halves to even."""
    columns = w_RC.shape[1] // steps_RG.shape[1]
    return codes(w_RC, steps_RG.float().repeat_interleave(columns, dim=1), bits).to(torch.int8)


def quantize(w: Tensor, bits: int, *, group: int = 0, clip: Clip = SQUARES, name: str = "weight") -> Coded:
    """A tensor of any shape rounded to codes; arguments and errors as for :func:`choose_steps`."""
    w_RC = matrix_of(checked(w, name))
    steps_RG = choose_steps(w_RC, bits, group=group, clip=clip, name=name)
    return Coded(codes=rounded(w_RC, steps_RG, bits), scales=steps_RG, bits=bits, shape=tuple(w.shape))


def entropy(codes_RC: Tensor) -> float:
    """The order-0 entropy of codes, in bits per code: what a coder that knows nothing but how often each occurs
    needs."""
    share = torch.bincount(codes_RC.flatten().int() + 128, minlength=256).double() / codes_RC.numel()
    return float(torch.special.entr(share).sum()) / math.log(2)


def _stored(step_N1: Tensor) -> Tensor:
    """As float16, within its range."""
    return step_N1.clamp(SMALLEST, LARGEST).half()


def least_squares(w_NC: Tensor, steps: Iterable[Tensor], codes_of: Callable[[Tensor], Tensor]) -> Tensor:
    """For each row that of several steps with which its codes have the least squared error, the first of equal ones.

    Args:
        w_NC: the rows.
        steps: one or more, (N, 1) each.
        codes_of: the codes (N, C) that steps make.
    """
    best_N1 = least_N1 = None
    for step_N1 in steps:
        error_N1 = (codes_of(step_N1) * step_N1 - w_NC).square().sum(dim=1, keepdim=True)
        if best_N1 is None or least_N1 is None:
            best_N1, least_N1 = step_N1, error_N1
            continue
        better_N1 = error_N1 < least_N1
        best_N1, least_N1 = torch.where(better_N1, step_N1, best_N1), torch.where(better_N1, error_N1, least_N1)
    assert best_N1 is not None
    return best_N1


def _least_squares(w_NC: Tensor, bits: int) -> Tensor:
    """The step of each row with which rounding has the least squared error, (N, 1), in float16 values."""
    whole_N1 = row_steps(w_NC, bits)
    steps = (_stored(whole_N1 * fraction).float() for fraction in FRACTIONS)
    best_N1 = least_squares(w_NC, steps, lambda step_N1: codes(w_NC, step_N1, bits))
    # Weights that no float16 step can reach are refused, also where a smaller part of them would have fitted.
    return torch.where(whole_N1 > LARGEST, whole_N1, best_N1)


def _multiple(w_NC: Tensor, size_N1: Tensor, bits: int, wanted: float) -> float:
    """The multiple of ``size`` for which codes have the entropy ``wanted``, in bits; the nearest within its range."""
    low, high = 0.1, 1e5  # almost all codes are the largest, and almost all are zero
    for _ in range(24):
        middle = math.sqrt(low * high)
        step_N1 = _stored(size_N1 * middle / (2 ** (bits - 1) - 1)).float()
        spent = entropy(codes(w_NC, step_N1, bits))
        # Very short steps make codes that are all at the ends, which have little entropy too.
        low, high = (middle, high) if spent > wanted or middle < 1 else (low, middle)
    return high
