"""``controller``: a loop whose maps a causal Controller modulates, from random weights; ``controller-published``: the
published geometry on a frozen pretrained model (docs/systems/controller.md)."""

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
from ouroboros.config.parts.loop import UpdateGateSpec
from ouroboros.config.parts.modulated import ControllerSpec, modulated
from ouroboros.recipes import RecipeEntry, recipe
from ouroboros.systems.controller.published import DONOR, LOOP, Published

_SIZES = {
    # layout, rank, style
    "tiny": (f"1 {LOOP}:(1)x2 1", 8, 16),
    "small": (f"2 {LOOP}:(2)x2 2", 16, 32),
    "base": (f"2 {LOOP}:(2)x2 2", 32, 64),
}


def controller(size: str = "small") -> Recipe:
    """The recipe ``loop`` with modulated maps: a Controller that sees the token alone, trained bases, and a gate of the
    update. It computes what ``loop`` computes at the start."""
    layout, rank, style = _SIZES[size]
    loop = recipe("loop", size)
    model = modulated(
        dataclasses.replace(loop.model, layout=layout),
        (ControllerSpec(rank=rank, style=style), UpdateGateSpec()),
        rank=rank,
        alpha=float(rank),
        trained=True,
    )
    description = "a loop whose maps are modulated by the state of each token"
    return dataclasses.replace(loop, name="controller", description=description, model=model)


def qwen(layers: int, hidden: int, heads: int, kv_heads: int, inner: int, vocabulary: int, context: int) -> ModelSpec:
    """The parts of a Qwen2.5 model, of ``layers`` layers."""
    return ModelSpec(
        layout=str(layers), vocab_size=vocabulary, hidden_size=hidden, max_position_embeddings=context
    ).replace(
        mixer=AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, qkv_bias=True, rope=RopeSpec(base=1e6)),
        ffn=FeedForwardSpec(intermediate_size=inner),
    )


def controller_published(size: str = "default") -> Recipe:
    """The published system on Qwen2.5-3B with 17 of its 36 layers; ``tiny`` is for trying things out.

    The published program draws the depth from 4, 8 and 16; here it is any from 4 to 16. Without a pretrained model all
    weights are random.
    """
    drawn = LoopTraining(sampling="uniform", min=4, max=16)
    donor, settings = qwen(36, 2048, 16, 2, 11008, 151_936, 32_768), Published()
    if size == "tiny":
        donor = qwen(8, 64, 4, 2, 96, 257, 128)
        settings = Published(prelude=2, looped=4, coda=2, depth=2, rank=4, style=8, steps=4, norm_steps=4)
    return Recipe(
        name="controller-published",
        description="Controller as published: frozen model, pooling that is not causal",
        model=settings.model(donor),
        data=DataSpec(tokenizer="bytes", sequence_length=2048 if size == "default" else 64),
        optim=OptimSpec(
            matrix_optimizer="adamw",
            lr=3e-4,
            weight_decay=0.01,
            decay="all",
            schedule="constant",
            warmup_fraction=124 / 18_750,
            left_out=DONOR,
        ),
        train=TrainSpec(batch_size=8) if size == "tiny" else TrainSpec(batch_size=32, loops=drawn),
    )


CONTROLLER = RecipeEntry(make=controller)
CONTROLLER_PUBLISHED = RecipeEntry(
    make=controller_published, sizes=("tiny", "default"), aliases={"small": "default", "base": "default"}
)
