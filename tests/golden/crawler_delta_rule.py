"""Recorded numbers of the delta-rule memory: one pass, and a second one with an empty and with a carried state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from ouroboros.config.parts.delta_rule import DeltaRuleSpec
from ouroboros.nn.delta_rule import DeltaRule
from ouroboros.nn.memory import Recorder
from ouroboros.nn.visit import VisitContext


class Handed(Recorder):
    """A memory that starts with the state it is given, and records the last one."""

    def __init__(self, start: Tensor | None) -> None:
        super().__init__()
        self.start = start

    def state(self) -> Tensor | None:  # pyrefly: ignore[bad-override]
        return self.start


def delta_rule(case: dict[str, Any], path: Path, work: Path) -> None:
    """``rms(x + mixer(x))`` twice. The library has no carried state: this test hands it over by itself."""
    tensors = load_file(path.with_suffix(".safetensors"))
    mixer = DeltaRule(DeltaRuleSpec(num_heads=case["heads"]), case["dim"], 0.0)
    mixer.load_state_dict({n.removeprefix("param/"): t for n, t in tensors.items() if n.startswith("param/")})
    nothing = torch.empty(0)

    def passed(x_BTD: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
        memory = Handed(start)
        y_BTD = mixer(x_BTD, VisitContext((nothing, nothing), memory=memory))
        assert memory.end_state is not None
        return F.rms_norm(x_BTD + y_BTD, (case["dim"],)), memory.end_state

    found = {}
    with torch.no_grad():
        found["y_first"], found["state_after_first"] = passed(tensors["x"], None)
        found["y_second_zero_state"], _ = passed(tensors["y_first"], None)
        found["y_second_carried_state"], _ = passed(tensors["y_first"], tensors["state_after_first"])
    assert found.keys() == {name for name in tensors if name != "x" and not name.startswith("param/")}
    words = case["tolerance"].replace(",", "").split()
    limits = {name: float(value) for name, value in zip(words[::2], words[1::2], strict=True)}
    for name, value in found.items():
        torch.testing.assert_close(value, tensors[name], **limits, msg=lambda text, name=name: f"{name}: {text}")


KINDS = {"delta_rule": delta_rule}
