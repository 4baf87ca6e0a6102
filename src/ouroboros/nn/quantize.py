"""Weights as whole multiples of a step, one step for each row, and training that already computes with them.

Shapes: R rows (outputs of a linear map, entries of a table), C columns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

TINY = torch.finfo(torch.float32).tiny
"""The smallest step, so that a row of zeros divides by something."""


def row_steps(w_RC: Tensor, bits: int, *, clip: float = 1.0, smallest: float = 0.0) -> Tensor:
    """The step of each row: ``max(q / (2^(bits - 1) - 1), smallest)``, ``q`` the ``clip`` quantile of ``|w|``.

    Args:
        w_RC: the weights.
        bits: of a code, at least 2.
        clip: in (0, 1], interpolated linearly between the two nearest values; 1 is the largest.
        smallest: a limit that does not depend on the weights. Where it exceeds what a row needs, the row has few
            levels.

    Returns:
        The steps, (R, 1), in float32.
    """
    columns = w_RC.size(1)
    position = clip * (columns - 1)
    below = int(position)
    # The quantile lies near the top, so a few values have to be sorted and not the row.
    top_RK = w_RC.detach().float().abs().topk(columns - below, dim=1).values
    low_R1, high_R1 = top_RK[:, -1:], top_RK[:, -2:-1] if below < columns - 1 else top_RK[:, -1:]
    q_R1 = torch.lerp(low_R1, high_R1, position - below)
    return (q_R1 / (2 ** (bits - 1) - 1)).clamp(min=max(smallest, TINY))


def codes(w_RC: Tensor, step_R1: Tensor, bits: int) -> Tensor:
    """The nearest whole numbers of steps within ``[-2^(bits - 1), 2^(bits - 1) - 1]``, halves to even, in float32."""
    return (w_RC.detach().float() / step_R1).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def quantized(w_RC: Tensor, bits: int, *, clip: float = 1.0, smallest: float = 0.0) -> Tensor:
    """``w_RC`` rounded to its codes; arguments as for :func:`row_steps`."""
    step_R1 = row_steps(w_RC, bits, clip=clip, smallest=smallest)
    return (codes(w_RC, step_R1, bits) * step_R1).to(w_RC.dtype)


def noisy(w_RC: Tensor, step_R1: Tensor, generator: torch.Generator) -> Tensor:
    """``w_RC`` with an error as of rounding: uniform within half a step.

    Args:
        w_RC: the weights.
        step_R1: whose rounding is imitated; a step for each row, or for each weight.
        generator: on the CPU, so that every device draws the same.
    """
    draws_RC = torch.rand(w_RC.shape, generator=generator).to(w_RC.device) - 0.5
    return (w_RC.detach().float() + draws_RC * step_R1).to(w_RC.dtype)


@contextlib.contextmanager
def straight_through(changes: Mapping[nn.Parameter, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Within the context every parameter has the value ``change(value)``; after it, its own again.

    A backward pass inside gives the gradient at the changed values, which is the straight-through estimate for the
    parameters themselves: ``w + stop_gradient(change(w) - w)`` (Bengio et al. 2013). A shared weight is changed once,
    however often it is visited.
    """
    kept = [parameter.detach().clone() for parameter in changes]
    try:
        with torch.no_grad():
            for parameter, change in changes.items():
                parameter.copy_(change(parameter))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(changes, kept, strict=True):
                parameter.copy_(value)
