"""The recipes: ours starts as the plain loop, the published one trains what it says."""

from __future__ import annotations

import pytest
import torch

from ouroboros.accounting import cost
from ouroboros.eval.subject import logits_of
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.optim import build_optimizers
from ouroboros.recipes import recipe, sizes
from ouroboros.verbs.show import show


def test_ours_starts_as_the_plain_loop() -> None:
    """Bit for bit, at equal weights: diagonals of zero add nothing, and the gate of the update is one."""
    plain, ours = (
        OuroborosForCausalLM(OuroborosConfig.from_spec(recipe(name, "tiny").model)).eval()
        for name in ("loop", "controller")
    )
    assert not ours.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    ids = torch.randint(0, 257, (2, 9))
    assert torch.equal(logits_of(plain, ids), logits_of(ours, ids))


def test_sizes_grow() -> None:
    counts = [cost(recipe("controller", size).model).parameters for size in sizes("controller")]
    assert counts == sorted(counts) and sizes("controller") == ("tiny", "small", "base")


def test_published_geometry_is_counted_without_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert show(["controller-published"]) == 0
    shown = capsys.readouterr().out
    assert "trained parameters        9,214,592" in shown
    # The 17 layers that stay with embedding and norm, what is trained, and the bases.
    assert f"{1_621_475_840 + 9_214_592 + 1_662_976:,}" in shown


def test_the_published_program_trains_controller_gate_and_norms() -> None:
    published = recipe("controller-published", "tiny")
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(published.model))
    optimizers = build_optimizers(model, published.optim)
    trained = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    assert {name for name, p in model.named_parameters() if p in trained} == {
        name for name, _ in model.named_parameters() if ".loops." in name
    }
