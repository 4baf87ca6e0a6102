"""The bridge of a cut model, fitted to the state of the whole one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec
from ouroboros.config.parts.loop import BridgeSpec
from ouroboros.convert.bridge import fit_bridge
from ouroboros.errors import OuroborosError
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM

SPEC = ModelSpec(layout="4", vocab_size=61, hidden_size=16, max_position_embeddings=64).replace(
    mixer=AttentionSpec(num_heads=2), ffn=FeedForwardSpec(intermediate_size=24)
)


@pytest.fixture
def pair() -> tuple[OuroborosForCausalLM, OuroborosForCausalLM]:
    """A whole model, and one that keeps its layers 0, 1 and 3."""
    torch.manual_seed(0)
    donor = OuroborosForCausalLM(OuroborosConfig.from_spec(SPEC)).eval()
    spec = SPEC.replace(layout="1 loop:(1)x1 1", loop=(BridgeSpec(),))
    cut = OuroborosForCausalLM(OuroborosConfig.from_spec(spec)).eval()
    state = donor.state_dict()
    for block, layer in enumerate((0, 1, 3)):
        prefix = f"model.decoder.layers.{layer}."
        cut.model.decoder.layers[block].load_state_dict(
            {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        )
    cut.load_state_dict({n: t for n, t in state.items() if ".layers." not in n}, strict=False)
    return donor, cut


def batches(count: int) -> Any:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 61, (8, 32), generator=generator) for _ in range(count)]


def test_an_affine_replacement_is_found_exactly(pair: Any) -> None:
    """Where the removed layer adds an affine map of the state, so does the bridge, and logits are the donor's."""
    donor, cut = pair
    removed = donor.model.decoder.layers[2]
    M, b = torch.randn(16, 16) * 0.1, torch.randn(16)

    def affine(x: torch.Tensor, visit: Any) -> torch.Tensor:
        return x + x @ M.T + b

    removed.forward = affine
    found = fit_bridge(cut, donor, batches(12), layer=3)
    assert found.tokens == 12 * 8 * 32 and found.after < 1e-3 * found.before
    ids = batches(1)[0]
    with torch.no_grad():
        gap = (cut(ids).logits - donor(ids).logits).abs().max()
        assert gap < 0.02 * donor(ids).logits.abs().max()


def test_the_fit_says_what_it_gained_on_text_that_chose_the_penalty(pair: Any) -> None:
    donor, cut = pair
    ids = batches(20)[1]
    with torch.no_grad():
        states: list[Any] = [
            model.model(input_ids=ids, output_hidden_states=True).hidden_states for model in (donor, cut)
        ]
    wanted, before = states[0][3], states[1][2]
    found = fit_bridge(cut, donor, [batches(20)[0], ids], layer=3)
    relative = ((wanted - before).square().sum(-1) / wanted.square().sum(-1)).mean()
    assert found.before == pytest.approx(relative.item(), rel=1e-3)
    with pytest.raises(OuroborosError, match="too few tokens"):
        fit_bridge(cut, donor, batches(1), layer=3)
