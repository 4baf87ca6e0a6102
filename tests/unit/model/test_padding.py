"""Padding told from masks of every form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ouroboros.model.padding import leading_padding, padding_of

REAL = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [0, 1, 1, 0, 1, 1]])
"""Six positions of four sequences."""


def prepared(form: str, past: int, tokens: int, room: int = 6) -> Tensor:
    """A mask for the positions from ``past`` on."""
    if form == "2-D":
        return REAL[:, : past + tokens]
    keys = torch.zeros(4, room, dtype=torch.bool)
    keys[:, : past + tokens] = REAL[:, : past + tokens].bool()
    causal = torch.arange(room) <= torch.arange(past, past + tokens)[:, None]
    mask = (keys[:, None] & causal)[:, None]
    if form == "boolean":
        return mask
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("room", [6, 9])
@pytest.mark.parametrize("form", ["2-D", "boolean", "additive"])
def test_every_form_and_chunk(form: str, room: int) -> None:
    for past in range(6):
        for tokens in range(1, 7 - past):
            mask = prepared(form, past, tokens, room)
            for before in (past, torch.tensor(past)):
                padding = padding_of(mask, tokens, before)
                assert padding is not None
                assert torch.equal(padding.long(), REAL[:, past : past + tokens])
                leading = leading_padding(mask, tokens, before)
                assert leading is not None
                assert leading.tolist() == [min(max(p - past, 0), tokens) for p in (0, 2, 5, 1)]


def test_no_mask_no_padding() -> None:
    assert padding_of(None, 3, 0) is None and leading_padding(None, 3, 0) is None


def test_documents_side_by_side_are_no_padding() -> None:
    """A mask that parts documents hides keys, but every position sees itself."""
    mask = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).tril().bool()[None, None]
    padding = padding_of(mask, 5, 0)
    assert padding is not None and padding.all()
