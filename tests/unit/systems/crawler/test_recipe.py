"""The recipes: the submission as it is and as it should be."""

from __future__ import annotations

import pytest
import torch

from ouroboros.accounting import cost
from ouroboros.config.parts.helix import HelixSpec
from ouroboros.eval.subject import build_perturbed
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.recipes import recipe, sizes


def test_as_published() -> None:
    published = recipe("crawler-published").model
    assert cost(published).parameters == 26_253_908
    assert published.layout == "4 crawler:(1)x2 5" and published.hidden_size == 512
    assert sizes("crawler-published") == ("tiny", "default")
    assert recipe("crawler-published", "base") == recipe("crawler-published", "default")


@pytest.mark.parametrize("name", ["crawler", "helix"])
def test_ours_stand_between_sizes_and_do_not_depend_on_the_length(name: str) -> None:
    """Nothing is stored that no block reads, and a rotation does not change with the context."""
    counts = [cost(recipe(name, size).model).parameters for size in sizes(name)]
    assert counts == sorted(counts) and sizes(name) == ("tiny", "small", "base")
    for size in sizes(name):
        model = recipe(name, size).model
        assert "unconnected_values" not in [part.kind for part in model.stem]
        rope = model.block.mixer.rotary(model.hidden_size)
        assert rope is not None and rope[0].original_context is None and rope[0].rotated(rope[1]) > 0


def test_helix_starts_as_a_plain_stack() -> None:
    """The second stream is nothing at the start, and then learns."""
    spec = recipe("helix", "tiny").model
    assert isinstance(spec.topology, HelixSpec) and spec.topology.merge == "linear"
    torch.manual_seed(0)
    model, ids = OuroborosForCausalLM(OuroborosConfig.from_spec(spec)).eval(), torch.arange(24).view(2, 12)
    shared = spec.schedule.blocks_at(spec.topology.stream)
    before = model(ids).logits
    for block in shared:
        for parameter in model.model.decoder.layers[block].parameters():
            parameter.data.add_(1.0)
    assert torch.equal(model(ids).logits, before)
    model.model.decoder.topology.exchange.merge.data.fill_(0.1)
    assert not torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("name", ["crawler", "helix", "crawler-published"])
def test_no_logit_sees_a_later_token(name: str) -> None:
    torch.manual_seed(0)
    model, ids = build_perturbed(recipe(name, "tiny").model).eval(), torch.arange(24).view(2, 12)
    changed = ids.clone()
    changed[:, -1] = 40
    torch.testing.assert_close(model(changed).logits[:, :-1], model(ids).logits[:, :-1], rtol=0, atol=1e-5)
