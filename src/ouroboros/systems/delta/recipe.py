"""``delta``: the delta residual in place of the addition (OUROBOROS, Deep Delta Learning; arXiv 2601.00417)."""

from __future__ import annotations

import dataclasses
from typing import Any

from ouroboros.config import DataSpec, OptimSpec, Recipe, RMSNormSpec, TrainSpec
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.recipes import SIZES, RecipeEntry
from ouroboros.recipes.gpt import gpt
from ouroboros.systems.delta.config import OuroborosConfig

_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 257, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 32},
    "small": {"vocab_size": 257, "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 2, "head_dim": 64},
    "published": {},
    "medium": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 8},
}
"""``tiny`` and ``small`` are the plain decoder's; the other two are published. What is not said is as published."""
_PUBLISHED_DATA = DataSpec(tokenizer="bpe:4096", sequence_length=1024)
_PUBLISHED_TRAINING = TrainSpec(batch_size=480, accumulation=60)
"""100,000 updates of 480 sequences were published, on four large accelerators."""


def delta(size: str = "small") -> Recipe:
    """The plain decoder with the delta residual, as it should be: queries and keys are normalised before the rotation
    (so that scores depend on distances alone), norms have a smaller eps, and compressors start as an average.

    With ``residual`` set to ``additive`` it is its own control arm.
    """
    published, optim = delta_published(size), OptimSpec()
    mixer = published.model.block.mixer.replace(qk_norm="before_rope")
    model = published.model.replace(mixer=mixer, norm=RMSNormSpec(), residual=DeltaSpec())
    if size in SIZES:
        plain = gpt(size)
        longest, optim = plain.model.max_position_embeddings, plain.optim
        model = model.replace(ffn=plain.model.block.ffn, max_position_embeddings=longest)
    return dataclasses.replace(
        published,
        name="delta",
        description="delta residual: each sublayer erases and writes along one direction",
        model=model,
        optim=optim,
    )


def delta_published(size: str = "published") -> Recipe:
    """The model as published, for parity: RMS gains after the rotation, eps 1e-5, random compressors; AdamW, cosine."""
    plain = gpt(size) if size in SIZES else None
    return Recipe(
        name="delta-published",
        description="delta as published: query/key norm after the rotation, AdamW with a cosine",
        model=OuroborosConfig(**_SHAPES[size]).spec,
        data=_PUBLISHED_DATA if plain is None else plain.data,
        optim=OptimSpec(matrix_optimizer="adamw", lr=1e-3, schedule="cosine"),
        train=_PUBLISHED_TRAINING if plain is None else plain.train,
    )


_CHOICES: dict[str, Any] = {"sizes": tuple(_SHAPES), "aliases": {"base": "published"}}
DELTA = RecipeEntry(make=delta, **_CHOICES)
DELTA_PUBLISHED = RecipeEntry(make=delta_published, **_CHOICES)
