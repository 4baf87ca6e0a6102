"""Tensors as multiples of steps."""

from __future__ import annotations

import pytest
import torch

from ouroboros.errors import OuroborosError
from ouroboros.pack.coded import Coded


def test_dense_multiplies_every_code_by_the_step_of_its_group() -> None:
    codes = torch.tensor([[1, -2, 3, 4], [0, 5, -6, 7]], dtype=torch.int8)
    scales = torch.tensor([[0.5, 2.0], [1.0, 0.25]], dtype=torch.float16)
    wanted = torch.tensor([[[0.5, -1.0], [6.0, 8.0]], [[0.0, 5.0], [-1.5, 1.75]]])
    assert Coded(codes=codes, scales=scales, bits=4, shape=(2, 2, 2)).dense().equal(wanted)


def test_what_does_not_fit_together_is_refused() -> None:
    codes, scales = torch.zeros(2, 6, dtype=torch.int8), torch.ones(2, 4, dtype=torch.float16)
    with pytest.raises(OuroborosError, match=r"scales of shape \(2, 4\) do not fit"):
        Coded(codes=codes, scales=scales, bits=4, shape=(2, 6))
    with pytest.raises(OuroborosError, match="2 to 8 bits"):
        Coded(codes=codes, scales=scales[:, :1], bits=9, shape=(2, 6))
    with pytest.raises(OuroborosError, match="do not fit"):
        Coded(codes=codes, scales=scales[:, :1], bits=6, shape=(2, 5))
