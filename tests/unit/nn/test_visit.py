"""What a visit is given: values that a call can change without touching the call before it."""

from __future__ import annotations

import torch

from ouroboros.nn.visit import VisitContext


def test_what_is_not_said_is_plain() -> None:
    tables = torch.ones(1, 1, 3, 2), torch.zeros(1, 1, 3, 2)
    given = VisitContext(tables)
    assert all(value is None for value in (given.mask, given.padding, given.key_rotary, given.positions))
    assert given.memory is given.visit is given.carried is None and given.last
    moved = given._replace(positions=torch.arange(3)[None])
    assert given.positions is None and moved.rotary is tables and torch.equal(moved.positions, torch.arange(3)[None])
