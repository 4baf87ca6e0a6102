"""The block: norms and residuals around mixer and feed-forward network."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ouroboros.config import AttentionSpec, BlockSpec, FeedForwardSpec, LayerNormSpec, NoFeedForwardSpec, RMSNormSpec
from ouroboros.config.part import _MODULES
from ouroboros.config.parts.osam import OsamSpec
from ouroboros.nn.block import Block
from ouroboros.nn.memory import Recorder
from ouroboros.nn.norm import LayerNorm
from ouroboros.nn.rope import Rope
from ouroboros.nn.visit import VisitContext

SPEC = BlockSpec(
    mixer=AttentionSpec(num_heads=2),
    ffn=FeedForwardSpec(intermediate_size=24),
    norm=RMSNormSpec(placement="sandwich", eps=1e-4),
)


@pytest.fixture
def given() -> VisitContext:
    return VisitContext(Rope(SPEC.mixer.rope, 8)(torch.arange(5)[None]))


def build(**changes: Any) -> Block:
    """A block of width 16 with random weights."""
    block = Block(dataclasses.replace(SPEC, **changes), 16)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


@pytest.mark.parametrize("placement", ["pre", "sandwich"])
def test_order_of_sublayers(placement: Any, given: VisitContext) -> None:
    block = build(norm=RMSNormSpec(placement=placement))
    x = torch.randn(2, 5, 16)
    update = block.self_attn(block.input_layernorm(x), given)
    state = x + (block.mixer_output_layernorm(update) if placement == "sandwich" else update)
    update = block.mlp(block.post_attention_layernorm(state))
    state = state + (block.mlp_output_layernorm(update) if placement == "sandwich" else update)
    torch.testing.assert_close(block(x, given), state)


def test_norms_have_the_specified_eps() -> None:
    block = build()
    assert {m.eps for name, m in block.named_modules() if name.endswith("layernorm")} == {1e-4}
    assert sum(name.endswith("layernorm") for name, _ in block.named_modules()) == 4


def test_residuals_see_stream_update_and_what_the_sublayer_read(given: VisitContext) -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    raw: list[Tensor] = []

    class Watching(nn.Module):
        def forward(self, x: Tensor, update: Tensor, context: Tensor, before_norm: Tensor) -> Tensor:
            seen.append((x, update, context))
            raw.append(before_norm)
            return x + update

    block, x = build(), torch.randn(1, 5, 16)
    block.mixer_residual, block.mlp_residual = Watching(), Watching()
    block(x, given)
    (first, _, read), (second, update, _) = seen
    assert first is x and raw[0] is x and raw[1] is second
    torch.testing.assert_close(read, block.input_layernorm(x))
    torch.testing.assert_close(second, x + seen[0][1])
    torch.testing.assert_close(update, block.mlp_output_layernorm(block.mlp(block.post_attention_layernorm(second))))


def test_memory_reaches_the_mixer(given: VisitContext) -> None:
    recorder = Recorder()
    build()(torch.randn(1, 5, 16), given._replace(memory=recorder))
    keys = recorder.recorded().keys
    assert keys is not None and keys.shape == (1, 2, 5, 8)


def test_mixer_is_the_registered_one(monkeypatch: pytest.MonkeyPatch, given: VisitContext) -> None:
    class Nothing(nn.Module):
        def __init__(self, mixer: AttentionSpec, width: int, eps: float) -> None:
            super().__init__()
            assert mixer is SPEC.mixer and width == 16 and eps == 1e-4

        def forward(self, x: Tensor, visit: VisitContext) -> Tensor:
            assert visit is given
            return torch.zeros_like(x)

    monkeypatch.setitem(_MODULES, AttentionSpec, Nothing)
    block, x = build(), torch.randn(1, 5, 16)
    expected = x + block.mlp_output_layernorm(block.mlp(block.post_attention_layernorm(x)))
    torch.testing.assert_close(block(x, given), expected)


def test_dropout_applies_to_both_sublayers(given: VisitContext) -> None:
    block = build(dropout=0.5)
    assert block.mixer_residual.dropout is not None and block.mlp_residual.dropout is not None
    x = torch.randn(1, 5, 16)
    assert not torch.equal(block(x, given), block(x, given))
    block.eval()
    assert torch.equal(block(x, given), block(x, given))


@pytest.mark.parametrize("placement", ["pre", "sandwich", "final"])
def test_without_a_feed_forward_network_the_block_is_its_first_half(placement: Any, given: VisitContext) -> None:
    block = build(norm=RMSNormSpec(placement=placement), ffn=NoFeedForwardSpec())
    x = torch.randn(2, 5, 16)
    update = block.self_attn(block.input_layernorm(x) if placement != "final" else x, given)
    update = block.mixer_output_layernorm(update) if placement == "sandwich" else update
    torch.testing.assert_close(block(x, given), x + update)
    names = {name.partition(".")[0] for name, _ in block.named_parameters()}
    norms = {"pre": {"input_layernorm"}, "sandwich": {"input_layernorm", "mixer_output_layernorm"}, "final": set()}
    assert names == {"self_attn"} | norms[placement]
    assert [p.out_features for p in block.output_projections()] == [16]


def test_final_placement_normalises_nothing_in_a_block(given: VisitContext) -> None:
    block = build(norm=RMSNormSpec(placement="final"))
    x = torch.randn(2, 5, 16)
    state = x + block.self_attn(x, given)
    torch.testing.assert_close(block(x, given), state + block.mlp(state))
    assert not any("norm" in name for name, _ in block.named_parameters())


def test_norms_are_of_the_specified_kind() -> None:
    block = build(norm=LayerNormSpec(placement="sandwich", eps=1e-3))
    norms = [module for name, module in block.named_modules() if name.endswith("layernorm")]
    assert [(type(norm), norm.eps) for norm in norms] == [(LayerNorm, 1e-3)] * 4


def test_outputs_of_a_mixer_with_several() -> None:
    mixer = OsamSpec(buckets=9, readout_hidden=5)
    block = build(mixer=mixer)
    assert block.output_projections() == [block.self_attn.readout_out, block.self_attn.value_out, block.mlp.down_proj]
    block = build(mixer=dataclasses.replace(mixer, value_path=False))
    assert block.output_projections() == [block.self_attn.readout_out, block.mlp.down_proj]
