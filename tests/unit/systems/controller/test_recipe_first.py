"""The recipes of the first generation: the published sizes, and a start that adds nothing."""

from __future__ import annotations

import pytest
import torch

from ouroboros.accounting import cost
from ouroboros.eval.subject import logits_of
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.recipes import recipe, sizes


@pytest.mark.parametrize(("size", "controller"), [("small", 39_942_464), ("base", 51_616_384)])
def test_published_sizes(size: str, controller: int) -> None:
    """Section 6.2: what stands beside the block is what an equal model without a Controller lacks."""
    model = recipe("controller-first-published", size).model
    plain = model.replace(mixer=model.block.mixer.unlooped, ffn=model.block.ffn.unlooped, loop=())
    # The table of steps has 128 rows in both presets.
    assert cost(model).parameters - cost(plain).parameters == controller


def test_it_starts_as_the_block_alone() -> None:
    """Bit for bit: additions of zero add nothing."""
    assert sizes("controller-first") == ("tiny", "small", "base")
    ids = torch.randint(0, 257, (2, 9))
    for name in ("controller-first", "controller-first-published"):
        spec = recipe(name, "tiny").model
        ours = OuroborosForCausalLM(OuroborosConfig.from_spec(spec)).eval()
        without = spec.replace(mixer=spec.block.mixer.unlooped, ffn=spec.block.ffn.unlooped, loop=())
        plain = OuroborosForCausalLM(OuroborosConfig.from_spec(without)).eval()
        assert not plain.load_state_dict(ours.state_dict(), strict=False).missing_keys
        assert torch.equal(logits_of(plain, ids), logits_of(ours, ids))
