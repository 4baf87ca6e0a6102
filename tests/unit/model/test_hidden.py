"""Hidden states: how many, which, in every way to ask for them. The harness checks shapes and caches on every model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ouroboros.config import AttentionSpec, DeltaSpec, FeedForwardSpec, LoopSpec, ModelSpec
from ouroboros.errors import OuroborosError
from ouroboros.eval.harness import build_perturbed
from ouroboros.model.hidden import HiddenStates
from ouroboros.model.modeling import OuroborosForCausalLM

BASE = ModelSpec(
    layout="1 (1)x2 1",
    vocab_size=31,
    hidden_size=16,
    max_position_embeddings=64,
    mixer=AttentionSpec(num_heads=2),
    ffn=FeedForwardSpec(intermediate_size=24),
)
IDS = torch.randint(0, 30, (2, 7), generator=torch.Generator().manual_seed(0))


def build(**changes: Any) -> OuroborosForCausalLM:
    return build_perturbed(dataclasses.replace(BASE, **changes))


def outputs_of_blocks(model: OuroborosForCausalLM, **options: Any) -> tuple[list[Tensor], Any]:
    """What forward hooks see, and the model's own answer."""
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda block, given, output: seen.append(output))
        for block in model.model.decoder.layers
    ]
    output = model(IDS, use_cache=False, output_hidden_states=True, **options)
    for hook in hooks:
        hook.remove()
    return seen, output


@pytest.mark.parametrize("loop", [{}, {"norm": True, "gate": True, "contractive": 0.5}], ids=str)
def test_embeddings_then_what_every_visit_returns_then_the_output(loop: dict[str, Any]) -> None:
    model = build(loop=LoopSpec(**loop))
    seen, output = outputs_of_blocks(model)
    states = output.hidden_states
    assert len(states) == model.schedule.num_visits + 1 == len(seen) + 1 == 5
    assert torch.equal(states[0], model.model.embed_tokens(IDS))
    assert all(torch.equal(state, expected) for state, expected in zip(states[1:-1], seen[:-1], strict=True))
    assert torch.equal(states[-1], model.model.norm(seen[-1]))
    assert torch.equal(states[-1], model.model(IDS).last_hidden_state)


def test_an_expanded_state_counts_as_the_mean_of_its_channels() -> None:
    model = build(residual="delta", delta=DeltaSpec(values=3))
    seen, output = outputs_of_blocks(model)
    torch.testing.assert_close(output.hidden_states[0], model.model.embed_tokens(IDS))
    assert seen[0].shape == (2, 7, 3, 16)
    torch.testing.assert_close(output.hidden_states[1], seen[0].mean(2))


def test_learned_positions_belong_to_the_first() -> None:
    model = build(positions="learned")
    first = model(IDS, output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(first, model.model.embed_tokens(IDS) + model.model.embed_positions.weight[:7])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_with_registers_leaves_them_out(checkpointing: bool) -> None:
    model = build(registers=3)
    apart = model(IDS, output_hidden_states=True).hidden_states
    if checkpointing:
        model.model.gradient_checkpointing = True
    together = model.train()(IDS, output_hidden_states=True).hidden_states
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    together[1].sum().backward()
    assert model.model.registers.grad is not None


def test_every_way_to_ask() -> None:
    model = build()
    expected = model(IDS, output_hidden_states=True).hidden_states
    assert model(IDS).hidden_states is None and model.model(IDS).hidden_states is None
    assert model(IDS, use_cache=False, output_hidden_states=True, return_dict=False)[-1][0].shape == (2, 7, 16)
    logits, *_, states = model(IDS, output_hidden_states=True, return_dict=False)
    assert logits.shape == (2, 7, 31) and torch.equal(states[-1], expected[-1])
    last, states = model.model(IDS, use_cache=False, output_hidden_states=True, return_dict=False)
    assert torch.equal(last, states[-1])
    assert len(model(IDS, loops=4, use_cache=False, output_hidden_states=True).hidden_states) == 7
    model.config.output_hidden_states = True
    assert len(model(IDS).hidden_states) == 5 and model(IDS, output_hidden_states=False).hidden_states is None
    model.config.return_dict = False
    assert isinstance(model(IDS), tuple)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_generate(options: dict[str, Any]) -> None:
    model = build(registers=2)
    asked = {"output_hidden_states": True, "return_dict_in_generate": True, "max_new_tokens": 3, "min_new_tokens": 3}
    mask = torch.ones_like(IDS)
    found = model.generate(IDS, attention_mask=mask, do_sample=False, pad_token_id=0, **asked, **options)
    assert len(found.hidden_states) == 3 and {len(states) for states in found.hidden_states} == {5}
    rows = 2 * options.get("num_beams", 1)
    assert found.hidden_states[0][0].shape == (rows, 7, 16)
    later = 8 if options.get("use_cache") is False else 1
    assert found.hidden_states[1][0].shape == (rows, later, 16)


def test_off_collects_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    monkeypatch.setattr(HiddenStates, "__init__", lambda *given, **options: pytest.fail("collected"))
    model(IDS)


def test_call_goes_through_another() -> None:
    def doubled(block: nn.Module, x: Tensor) -> Tensor:
        return 2 * block(x)

    states = HiddenStates(torch.zeros(1, 2, 3), doubled, expanded=False)
    assert states.call(nn.Identity(), torch.ones(1, 4, 3)).shape == (1, 4, 3)
    kept = states.ending_with(torch.full((1, 2, 3), 9.0))
    assert [float(x.mean()) for x in kept] == [0.0, 9.0] and float(states.states[1].mean()) == 2


@pytest.mark.parametrize("where", ["call", "generate", "model"])
def test_attention_weights_are_refused_with_the_reason(where: str) -> None:
    model = build()
    with pytest.raises(OuroborosError, match="output_attentions: attention weights are never formed here"):
        if where == "generate":
            model.generate(IDS, output_attentions=True, return_dict_in_generate=True, max_new_tokens=2)
        else:
            (model if where == "call" else model.model)(IDS, output_attentions=True)
