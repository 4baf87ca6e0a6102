"""``controller-first``: one block applied to the embeddings, whose Controller makes whole matrices;
``controller-first-published``: the same as published (docs/systems/controller.md)."""

from __future__ import annotations

import dataclasses

from ouroboros.config import (
    AttentionSpec,
    DataSpec,
    FeedForwardSpec,
    LoopTraining,
    ModelSpec,
    OptimSpec,
    Recipe,
    RopeSpec,
    TrainSpec,
)
from ouroboros.recipes import RecipeEntry
from ouroboros.systems.controller.first import FirstGeneration
from ouroboros.systems.controller.recipe import qwen

LLAMA = ModelSpec(layout="28", vocab_size=128_256, hidden_size=3072, max_position_embeddings=131_072).replace(
    mixer=AttentionSpec(num_heads=24, num_kv_heads=8, rope=RopeSpec(base=5e5)),
    ffn=FeedForwardSpec(intermediate_size=8192),
)
"""The parts of Llama-3.2-3B."""
_HALF = FirstGeneration(
    rank=8, alpha=16.0, divisor=16, state=256, steps=128, confidence=16, hidden=512, style=32, depth=8
)
_TINY = FirstGeneration(
    rank=4, alpha=80.0, bases=2, divisor=8, state=16, steps=8, confidence=4, hidden=24, style=8, rows=4, depth=2
)
_SIZES = {
    # the pretrained model, what steers the loop, peak rate, share of the warm-up: as in the published second phase
    "tiny": (qwen(4, 64, 4, 2, 96, 257, 128), _TINY, 3e-3, 0.1),
    "small": (qwen(24, 896, 14, 2, 4864, 151_936, 32_768), _HALF, 1e-4, 1_000 / 5_000),
    "base": (LLAMA, FirstGeneration(), 5e-5, 500 / 937),
}
LEAST_RATE = 1e-6


def first(size: str, *, published: bool) -> Recipe:
    """The shared block in the second of its phases: any depth from 4 to 32, everything trained.

    Args:
        size: ``small`` has the geometry of Qwen2.5-0.5B, ``base`` that of Llama-3.2-3B.
        published: pooling that is not causal, and a start from which the Controller never learns.
    """
    donor, settings, lr, warmup = _SIZES[size]
    if not published:
        # Without halting there is no probability of having halted to look at.
        settings = dataclasses.replace(settings, pooling="token", norm=True, start="b_zero", confidence=0)
    tiny = size == "tiny"
    return Recipe(
        name="controller-first",
        description="one shared block whose Controller makes whole low-rank matrices",
        model=settings.shared(donor),
        data=DataSpec(tokenizer="bytes", sequence_length=64 if tiny else 2048),
        optim=OptimSpec(
            matrix_optimizer="adamw",
            lr=lr,
            weight_decay=0.1,
            decay="all",
            warmup_fraction=warmup,
            decay_fraction=1 - warmup,
            final_lr=LEAST_RATE / lr,
        ),
        train=TrainSpec(batch_size=8)
        if tiny
        else TrainSpec(batch_size=256, loops=LoopTraining(sampling="uniform", min=4, max=32)),
    )


def controller_first(size: str = "small") -> Recipe:
    """:func:`first` as a good engineer would ship it."""
    return first(size, published=False)


def controller_first_published(size: str = "small") -> Recipe:
    """:func:`first` as published."""
    description = "first generation as published: its Controller sees later tokens and never learns"
    return dataclasses.replace(first(size, published=True), name="controller-first-published", description=description)


CONTROLLER_FIRST = RecipeEntry(make=controller_first)
CONTROLLER_FIRST_PUBLISHED = RecipeEntry(make=controller_first_published)
