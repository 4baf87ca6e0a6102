"""Tensors at any address."""

from __future__ import annotations

import pytest
import torch

from ouroboros.nn.aligned import ALIGNMENT, aligned


@pytest.mark.parametrize("offset", [1, 4, 8, 15])
def test_a_tensor_that_lies_askew_is_copied(offset: int) -> None:
    askew = torch.arange(100.0)[offset:]
    assert askew.data_ptr() % ALIGNMENT != 0
    straight = aligned(askew)
    assert straight.data_ptr() % ALIGNMENT == 0 and torch.equal(straight, askew)


def test_others_are_as_they_are() -> None:
    for tensor in (torch.arange(100.0), torch.arange(100.0)[16:], torch.empty(0), torch.empty(3, device="meta")):
        assert aligned(tensor) is tensor
