"""The block: norms and residuals around mixer and feed-forward network."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec, NormSpec
from ouroboros.nn.block import MIXERS, Block
from ouroboros.nn.memory import Recorder
from ouroboros.nn.mixer import MixerInput
from ouroboros.nn.rope import Rope


def spec(**changes: Any) -> ModelSpec:
    return ModelSpec(
        hidden_size=16,
        mixer=AttentionSpec(num_heads=2),
        ffn=FeedForwardSpec(intermediate_size=24),
        norm=NormSpec(placement="sandwich", eps=1e-4),
        **changes,
    )


@pytest.fixture
def given() -> MixerInput:
    return MixerInput(Rope(spec().mixer.rope, 8)(torch.arange(5)[None]), None, None)


def randomised(block: Block) -> Block:
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


@pytest.mark.parametrize("placement", ["pre", "sandwich"])
def test_order_of_sublayers(placement: Any, given: MixerInput) -> None:
    block = randomised(Block(dataclasses.replace(spec(), norm=NormSpec(placement=placement))))
    x = torch.randn(2, 5, 16)
    update = block.self_attn(block.input_layernorm(x), given, None)
    state = x + (block.mixer_output_layernorm(update) if placement == "sandwich" else update)
    update = block.mlp(block.post_attention_layernorm(state))
    state = state + (block.mlp_output_layernorm(update) if placement == "sandwich" else update)
    torch.testing.assert_close(block(x, given), state)


def test_norms_have_the_specified_eps() -> None:
    block = Block(spec())
    assert {m.eps for name, m in block.named_modules() if name.endswith("layernorm")} == {1e-4}
    assert sum(name.endswith("layernorm") for name, _ in block.named_modules()) == 4


def test_residuals_see_stream_update_and_what_the_sublayer_read(given: MixerInput) -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    raw: list[Tensor] = []

    class Watching(nn.Module):
        def forward(self, x: Tensor, update: Tensor, context: Tensor, before_norm: Tensor) -> Tensor:
            seen.append((x, update, context))
            raw.append(before_norm)
            return x + update

    block, x = randomised(Block(spec())), torch.randn(1, 5, 16)
    block.mixer_residual, block.mlp_residual = Watching(), Watching()
    block(x, given)
    (first, _, read), (second, update, _) = seen
    assert first is x and raw[0] is x and raw[1] is second
    torch.testing.assert_close(read, block.input_layernorm(x))
    torch.testing.assert_close(second, x + seen[0][1])
    torch.testing.assert_close(update, block.mlp_output_layernorm(block.mlp(block.post_attention_layernorm(second))))


def test_memory_reaches_the_mixer(given: MixerInput) -> None:
    recorder = Recorder()
    Block(spec())(torch.randn(1, 5, 16), given, recorder)
    assert recorder.prefix is not None and recorder.prefix[0].shape == (1, 2, 5, 8)


def test_mixer_by_kind(monkeypatch: pytest.MonkeyPatch, given: MixerInput) -> None:
    class Nothing(nn.Module):
        def __init__(self, mixer: AttentionSpec, hidden_size: int, eps: float) -> None:
            super().__init__()
            assert hidden_size == 16 and eps == 1e-4

        def forward(self, x: Tensor, inputs: MixerInput, memory: object) -> Tensor:
            assert inputs is given
            return torch.zeros_like(x)

    monkeypatch.setitem(MIXERS, "attention", Nothing)
    block, x = randomised(Block(spec())), torch.randn(1, 5, 16)
    expected = x + block.mlp_output_layernorm(block.mlp(block.post_attention_layernorm(x)))
    torch.testing.assert_close(block(x, given), expected)


def test_dropout_applies_to_both_sublayers(given: MixerInput) -> None:
    block = Block(spec(dropout=0.5))
    assert block.mixer_residual.dropout is not None and block.mlp_residual.dropout is not None
    x = torch.randn(1, 5, 16)
    assert not torch.equal(block(x, given), block(x, given))
    block.eval()
    assert torch.equal(block(x, given), block(x, given))
