"""Ranges and resolved sizes of attention through latents."""

from __future__ import annotations

from typing import Any

import pytest

from ouroboros.config import BlockSpec, MixerPart, ModelSpec
from ouroboros.config.parts.latent import BottleneckAttentionSpec, LatentAttentionSpec
from ouroboros.errors import OuroborosError


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (LatentAttentionSpec, {"num_heads": 0}, "mixer.num_heads"),
        (LatentAttentionSpec, {"kv_rank": 0}, "mixer.kv_rank must be >= 1 or null, got 0"),
        (LatentAttentionSpec, {"rope_dim": 3}, "mixer.rope_dim must be even"),
        (LatentAttentionSpec, {"rope_dim": 0}, "mixer.rope_dim must be >= 2 or null"),
        (LatentAttentionSpec, {"query_rank": -1}, "mixer.query_rank"),
        (BottleneckAttentionSpec, {"latent_rank": 0}, "mixer.latent_rank"),
        (BottleneckAttentionSpec, {"dropout": 1.0}, "mixer.dropout"),
        (BottleneckAttentionSpec, {"head_dim": 0}, "mixer.head_dim"),
    ],
)
def test_ranges(cls: type[MixerPart], values: dict[str, Any], message: str) -> None:
    with pytest.raises(OuroborosError, match=message):
        cls(**values)  # pyrefly: ignore


@pytest.mark.parametrize("spec", [LatentAttentionSpec(), BottleneckAttentionSpec()], ids=lambda spec: spec.kind)
def test_heads_share_the_width(spec: MixerPart) -> None:
    with pytest.raises(OuroborosError, match="multiple of mixer.num_heads"):
        ModelSpec(hidden_size=30, block=BlockSpec(mixer=spec))


def test_resolved_sizes() -> None:
    spec = LatentAttentionSpec(num_heads=4)
    assert (spec.head_width(256), spec.rank(256), spec.latent_of_queries(256), spec.rotary_width(256)) == (
        64,
        64,
        64,
        32,
    )
    assert LatentAttentionSpec(query_rank=0).latent_of_queries(256) == 0
    assert spec.heads(256) == (4, 1, 64) and not spec.rebuilds_keys
    assert BottleneckAttentionSpec(num_heads=4).rank(256) == 64


def test_a_cache_of_latents_has_one_head_and_rebuilds_its_keys() -> None:
    latents, keys = BottleneckAttentionSpec(cache="latent"), BottleneckAttentionSpec()
    assert latents.heads(256) == (4, 1, 64) and keys.heads(256) == (4, 4, 64)
    assert latents.rebuilds_keys and not keys.rebuilds_keys
    assert latents.prefix_flops(256) == (2 * 64 * 2 * 256, 0) and keys.prefix_flops(256) == (0, 0)
