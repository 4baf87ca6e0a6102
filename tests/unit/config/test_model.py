"""Ranges of the model specification."""

from __future__ import annotations

from typing import Any

import pytest

from ouroboros.config import (
    AttentionSpec,
    BottleneckAttentionSpec,
    DeltaSpec,
    FeedForwardSpec,
    LatentAttentionSpec,
    LoopSpec,
    ModelSpec,
    NormSpec,
    RopeSpec,
)
from ouroboros.errors import OuroborosError

BAD_VALUES: list[tuple[type, dict[str, Any], str]] = [
    (RopeSpec, {"base": 1}, "rope.base"),
    (RopeSpec, {"fraction": 1.1}, "rope.fraction"),
    (RopeSpec, {"scale": 0}, "rope.scale"),
    (AttentionSpec, {"num_heads": 0}, "mixer.num_heads"),
    (AttentionSpec, {"num_heads": 4, "num_kv_heads": 0}, "mixer.num_kv_heads"),
    (AttentionSpec, {"num_heads": 4, "num_kv_heads": 3}, "multiple of mixer.num_kv_heads"),
    (AttentionSpec, {"dropout": 1.0}, "mixer.dropout"),
    (FeedForwardSpec, {"intermediate_size": 0}, "ffn.intermediate_size"),
    (FeedForwardSpec, {"dropout": 1}, "ffn.dropout"),
    (NormSpec, {"eps": 0}, "norm.eps"),
    (LoopSpec, {"contractive": 1.5}, "loop.contractive"),
    (LoopSpec, {"max_loops": 0}, "loop.max_loops"),
    (ModelSpec, {"vocab_size": 1}, "vocab_size"),
    (ModelSpec, {"hidden_size": 0}, "hidden_size"),
    (ModelSpec, {"hidden_size": 30}, "multiple of mixer.num_heads"),
    (ModelSpec, {"max_position_embeddings": 0}, "max_position_embeddings"),
    (ModelSpec, {"registers": -1}, "registers"),
    (ModelSpec, {"dropout": 1}, "dropout"),
    (ModelSpec, {"init_std": 0}, "init_std"),
    (ModelSpec, {"logit_softcap": 0}, "logit_softcap"),
    (ModelSpec, {"layout": ""}, "layout ''"),
    (ModelSpec, {"embedding_std": 0}, "embedding_std"),
    (ModelSpec, {"zero_init_outputs": True, "output_init": "depth_scaled"}, "exclude each other"),
    (ModelSpec, {"zero_init_outputs": True, "residual": "delta"}, "delta residual's direction"),
    (DeltaSpec, {"values": 0}, "delta.values"),
    (DeltaSpec, {"beta_init": 2.1}, r"delta.beta_init must be in \[0, 2\]"),
    (DeltaSpec, {"beta_init": -0.1}, r"delta.beta_init must be in \[0, 2\]"),
    (DeltaSpec, {"eps": 0}, "delta.eps"),
    (DeltaSpec, {"value_scale": 0}, "delta.value_scale"),
    (DeltaSpec, {"values": 5}, "leaves value channels unread"),
    (DeltaSpec, {"compressor": "token"}, "set delta.values to more than 1"),
    (DeltaSpec, {"embedding_conv": True}, "set delta.values to more than 1"),
    (LatentAttentionSpec, {"kv_rank": 0}, "mixer.kv_rank"),
    (LatentAttentionSpec, {"rope_dim": 3}, "mixer.rope_dim must be even"),
    (LatentAttentionSpec, {"query_rank": -1}, "mixer.query_rank"),
    (BottleneckAttentionSpec, {"latent_rank": 0}, "mixer.latent_rank"),
    (BottleneckAttentionSpec, {"dropout": 1.0}, "mixer.dropout"),
    (ModelSpec, {"register_std": -1}, "register_std"),
    (ModelSpec, {"hidden_size": 30, "mixer": LatentAttentionSpec()}, "multiple of mixer.num_heads"),
]


@pytest.mark.parametrize(("cls", "values", "message"), BAD_VALUES, ids=lambda value: str(value)[:40])
def test_ranges(cls: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(OuroborosError, match=message) as caught:
        cls(**values)
    assert "\n" not in str(caught.value)


def test_the_output_gate_includes_the_norm() -> None:
    assert not AttentionSpec().normalises_heads
    assert AttentionSpec(output_gate=True).normalises_heads and AttentionSpec(head_norm=True).normalises_heads


def test_resolved_sizes() -> None:
    assert AttentionSpec(num_heads=6).kv_heads == 6
    assert AttentionSpec(num_heads=6, num_kv_heads=2).kv_heads == 2
    assert AttentionSpec(num_heads=4).width(32) == 8
    assert AttentionSpec(num_heads=4, head_dim=5).width(32) == 5
    assert ModelSpec(hidden_size=30, mixer=AttentionSpec(num_heads=4, head_dim=8)).hidden_size == 30


def test_resolved_sizes_of_latent_attention() -> None:
    spec = LatentAttentionSpec(num_heads=4)
    assert (spec.width(256), spec.rank(256), spec.latent_of_queries(256), spec.rotary_width(256)) == (64, 64, 64, 32)
    assert LatentAttentionSpec(query_rank=0).latent_of_queries(256) == 0
    assert BottleneckAttentionSpec(num_heads=4).rank(256) == 64
    assert BottleneckAttentionSpec(num_heads=4, cache="latent").cached_heads() == 1


def test_gates_that_start_where_they_hardly_learn() -> None:
    assert [DeltaSpec(beta_init=start).frozen_gate for start in (0, 0.01, 1, 1.99, 2)] == [
        True,
        False,
        False,
        False,
        True,
    ]
