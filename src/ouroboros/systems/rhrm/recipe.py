"""``rhrm``: one block visited several times, latent attention, learned prefix (R-HRM; docs/systems/r-hrm.md)."""

from __future__ import annotations

import dataclasses
from typing import Any

from ouroboros.config import (
    BlockSpec,
    DataSpec,
    FeedForwardSpec,
    FilterSpec,
    ModelSpec,
    OptimSpec,
    Recipe,
    RMSNormSpec,
    TrainSpec,
)
from ouroboros.config.parts.head import LinearHeadSpec
from ouroboros.config.parts.latent import BottleneckAttentionSpec, LatentAttentionSpec
from ouroboros.recipes import RecipeEntry

_SIZES = {
    # hidden, heads, loops, sequence, batch, accumulation
    "tiny": (64, 2, 3, 64, 8, 1),
    "lite": (256, 4, 4, 128, 16, 4),
    "pro": (512, 8, 8, 256, 32, 2),
    "beast": (768, 12, 12, 256, 64, 2),
}
"""The published presets, and ``tiny`` for trying things out. The batch counts all accumulation steps."""
PUBLISHED_SIZES = {hidden: (heads, loops) for size, (hidden, heads, loops, *_) in _SIZES.items() if size != "tiny"}
"""Attention heads and loops of the published presets, by their width."""
_GPT2_ENTRIES = 50_257


def rhrm(size: str = "lite") -> Recipe:
    """The system as it should be: decoupled rotary keys, so that a cache holds latents alone."""
    hidden, heads, loops, sequence, batch, _ = _SIZES[size]
    return Recipe(
        name="rhrm",
        description="one block in a loop, latent attention, learned prefix",
        model=ModelSpec(
            layout=f"(1)x{loops}",
            vocab_size=4096,
            hidden_size=hidden,
            max_position_embeddings=2048,
            block=BlockSpec(
                mixer=LatentAttentionSpec(num_heads=heads),
                ffn=FeedForwardSpec(intermediate_size=4 * hidden),
                norm=RMSNormSpec(placement="sandwich"),
            ),
            registers=5,
        ),
        data=DataSpec(
            tokenizer="bpe:4096",
            sequence_length=max(sequence, 256) if size != "tiny" else sequence,
            filters=FilterSpec(
                max_characters=100_000,
                symbol_run=10,
                min_letters=0.3,
                max_repeated_lines=0.5,
                max_repeated_ngrams=0.5,
            ),
        ),
        optim=OptimSpec(lr=5e-3, embedding_lr=1e-2),
        train=TrainSpec(batch_size=max(batch // 2, 8), target_loss=2.1),
    )


def rhrm_published(size: str = "lite") -> Recipe:
    """The system as published (last revision), for parity; what differs from it is listed in docs/systems/r-hrm.md."""
    hidden, heads, loops, sequence, batch, accumulation = _SIZES[size]
    mixer = BottleneckAttentionSpec(num_heads=heads, dropout=0.1)
    ours = rhrm(size)
    return dataclasses.replace(
        ours,
        name="rhrm-published",
        description="rhrm as published: bottleneck attention, logits x 0.1, one-cycle AdamW",
        model=ModelSpec(
            layout=f"(1)x{loops}",
            vocab_size=_GPT2_ENTRIES,
            hidden_size=hidden,
            block=BlockSpec(
                mixer=mixer,
                ffn=FeedForwardSpec(intermediate_size=4 * hidden, bias=True, dropout=0.1),
                norm=RMSNormSpec(eps=1e-8),
                dropout=0.1,
            ),
            head=LinearHeadSpec(logit_scale=0.1),
            registers=5,
            register_std=1.0,
        ),
        data=dataclasses.replace(
            ours.data,
            sequence_length=sequence,
            filters=FilterSpec(max_characters=10_000, symbol_run=10, symbol_rule="ascii"),
        ),
        optim=OptimSpec(
            matrix_optimizer="adamw",
            lr=3e-4,
            weight_decay=0.1,
            decay="all",
            betas=(0.9, 0.999),
            schedule="one_cycle",
            warmup_fraction=0.1,
            decay_fraction=0.0,
            start_lr=1 / 25,
            final_lr=1 / 25 / 1e4,
            momentum_cycle=(0.85, 0.95),
        ),
        train=TrainSpec(batch_size=batch, accumulation=accumulation, target_loss=2.1),
    )


_CHOICES: dict[str, Any] = {
    "sizes": tuple(_SIZES),
    "aliases": {"small": "lite", "base": "pro"},
    "presets": (("beast", 12.0), ("pro", 6.0), ("lite", 0.0)),
}
RHRM = RecipeEntry(make=rhrm, **_CHOICES)
RHRM_PUBLISHED = RecipeEntry(make=rhrm_published, **_CHOICES)
