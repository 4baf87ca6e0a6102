"""What mixers are given: values that a call can change without touching the call before it."""

from __future__ import annotations

import torch

from ouroboros.nn.mixer import MixerInput


def test_what_is_not_said_is_plain() -> None:
    tables = torch.ones(1, 1, 3, 2), torch.zeros(1, 1, 3, 2)
    given = MixerInput(tables, None, None)
    assert given.key_rotary is given.positions is given.mask is given.padding is None
    moved = given._replace(positions=torch.arange(3)[None])
    assert given.positions is None and moved.rotary is tables and torch.equal(moved.positions, torch.arange(3)[None])
