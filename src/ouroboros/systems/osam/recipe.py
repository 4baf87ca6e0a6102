"""``osam``: a memory of constant size instead of a cache (one-shot algebraic map; docs/systems/osam.md)."""

from __future__ import annotations

from ouroboros.config import (
    BlockSpec,
    DataSpec,
    FeedForwardSpec,
    LayerNormSpec,
    ModelSpec,
    NoFeedForwardSpec,
    OptimSpec,
    Recipe,
    TrainSpec,
)
from ouroboros.config.parts.osam import OsamSpec
from ouroboros.recipes import RecipeEntry

_SIZES = {
    # hidden, blocks, buckets, sequence, batch
    "tiny": (32, 2, 128, 64, 8),
    "small": (128, 4, 512, 256, 16),
    "base": (256, 6, 1024, 512, 32),
}

_PUBLISHED = {
    # hidden, buckets, readout, sequence, batch
    "tiny": (16, 64, 32, 32, 8),
    "default": (64, 2048, 128, 64, 32),
    "quick-start": (128, 4096, 128, 128, 64),
}
"""The defaults of the published program, the command it shows first, and ``tiny`` for trying things out."""


def osam(size: str = "small") -> Recipe:
    """The system as it should be: blocks with residuals and feed-forward networks, keys and values that are trained,
    hashes of their own for queries and keys, and a memory that neither cancels nor saturates."""
    hidden, blocks, buckets, sequence, batch = _SIZES[size]
    return Recipe(
        name="osam",
        description="a memory of constant size instead of a cache",
        model=ModelSpec(
            layout=str(blocks),
            vocab_size=4096,
            hidden_size=hidden,
            max_position_embeddings=1_048_576,
            block=BlockSpec(
                mixer=OsamSpec(
                    buckets=buckets,
                    readout_hidden=hidden,
                    detach_state=False,
                    independent_hashes=True,
                    sketch_values=False,
                    frequencies=8,
                    decay=True,
                    time_scales=(1.25, 64.0),
                    normalisation="rms",
                    gate_cap=2.0,
                    gate_start=0.0,
                ),
                ffn=FeedForwardSpec(intermediate_size=3 * hidden),
            ),
        ),
        data=DataSpec(tokenizer="bpe:4096" if size != "tiny" else "bytes", sequence_length=sequence),
        optim=OptimSpec(lr=1e-2, embedding_lr=2e-2, scalar_lr=5e-2),
        train=TrainSpec(batch_size=batch),
    )


def osam_published(size: str = "default") -> Recipe:
    """The system as published (v0.1), for parity; what differs from it is listed in docs/systems/osam.md."""
    hidden, buckets, readout, sequence, batch = _PUBLISHED[size]
    quick = size == "quick-start"
    return Recipe(
        name="osam-published",
        description="osam as published: one block, detached keys and values, no norm but the last",
        model=ModelSpec(
            layout="1",
            vocab_size=128,
            hidden_size=hidden,
            max_position_embeddings=1_048_576,
            block=BlockSpec(
                mixer=OsamSpec(
                    buckets=buckets, readout_hidden=readout, kupdate=4 if quick else 1, dropout=0.1 if quick else 0.0
                ),
                ffn=NoFeedForwardSpec(),
                norm=LayerNormSpec(placement="final", eps=1e-5),
            ),
            tie_embeddings=False,
            embedding_std=1.0,
            head_std=(3 * hidden) ** -0.5,
        ),
        data=DataSpec(sources=("periodic:",), tokenizer="chars", sequence_length=sequence),
        optim=OptimSpec(
            matrix_optimizer="adamw",
            lr=3e-3,
            scalar_lr=3e-2,
            weight_decay=1e-2,
            decay="all",
            schedule="constant",
            warmup_fraction=0.0,
            decay_fraction=0.0,
        ),
        train=TrainSpec(batch_size=batch, label_smoothing=0.05 if quick else 0.0),
    )


OSAM = RecipeEntry(make=osam)
OSAM_PUBLISHED = RecipeEntry(
    make=osam_published, sizes=tuple(_PUBLISHED), aliases={"small": "default", "base": "quick-start"}
)
