"""Which checkpoints are told by their content; what the command makes of them is in tests/cli."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ouroboros.convert.checkpoint import Checkpoint
from ouroboros.convert.readers import reader_of
from ouroboros.systems.controller.reader import READER


@pytest.mark.parametrize(
    ("names", "known"),
    [
        (["controller.target_heads.q_proj.weight", "gate.gate_proj.bias"], True),
        (["controller.heads.q_proj.basis_A1"], True),
        (["static_diags"], True),
        (["_orig_mod.static_diags"], True),
        (["gate.gate_proj.bias", "step_norm.weights"], False),
        (["model.embed_tokens.weight"], False),
    ],
)
def test_recognised(names: list[str], known: bool) -> None:
    checkpoint = Checkpoint(path=Path("x.pt"), content={name: torch.zeros(1) for name in names})
    assert READER.recognises(checkpoint) == known
    inner = Checkpoint(path=Path("x.pt"), content={"state_dict": checkpoint.content, "step": 3})
    assert READER.recognises(inner) == known
    if known:
        assert reader_of(checkpoint) is READER
