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
    plain = model.replace(
        mixer=recipe("gpt").model.block.mixer.replace(**_heads(model)),
        ffn=recipe("gpt").model.block.ffn.replace(intermediate_size=model.block.ffn.hidden_width),
        loop=(),
    )
    # The table of steps has 128 rows in both presets.
    assert cost(model).parameters - cost(plain).parameters == controller


def _heads(model):
    mixer = model.block.mixer
    return {"num_heads": mixer.num_heads, "num_kv_heads": mixer.num_kv_heads, "qkv_bias": mixer.qkv_bias}


def test_it_starts_as_the_block_alone() -> None:
    """Bit for bit: additions of zero add nothing."""
    assert sizes("controller-first") == ("tiny", "small", "base")
    ids = torch.randint(0, 257, (2, 9))
    for name in ("controller-first", "controller-first-published"):
        spec = recipe(name, "tiny").model
        ours = OuroborosForCausalLM(OuroborosConfig.from_spec(spec)).eval()
        mixer = recipe("gpt").model.block.mixer.replace(rope=spec.block.mixer.rope, **_heads(spec))
        ffn = recipe("gpt").model.block.ffn.replace(intermediate_size=spec.block.ffn.hidden_width)
        plain = OuroborosForCausalLM(OuroborosConfig.from_spec(spec.replace(mixer=mixer, ffn=ffn, loop=()))).eval()
        assert not plain.load_state_dict(ours.state_dict(), strict=False).missing_keys
        assert torch.equal(logits_of(plain, ids), logits_of(ours, ids))
