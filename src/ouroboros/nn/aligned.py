"""Where the numbers of a tensor lie in memory, as far as its products depend on it."""

from __future__ import annotations

from torch import Tensor

ALIGNMENT = 64
"""Bytes: a cache line, and what torch's own memory on a CPU is a multiple of."""


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its memory begins at no multiple of :data:`ALIGNMENT`.

    A tensor that is mapped from a file lies at whatever address the file puts it. Products with it are slower there,
    and add up in another order, so that they differ in the last bits from those with the tensor that was saved.
    """
    mislaid = tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT != 0
    return tensor.clone() if mislaid else tensor
