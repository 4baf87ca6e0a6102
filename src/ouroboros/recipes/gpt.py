"""``gpt``: the plain decoder. Control arm and starting point; Llama-shaped."""

from __future__ import annotations

from ouroboros.config import (
    AttentionSpec,
    BlockSpec,
    DataSpec,
    FeedForwardSpec,
    ModelSpec,
    OptimSpec,
    Recipe,
    TrainSpec,
)

_SIZES = {
    # hidden, heads, intermediate, blocks, sequence, batch, learning rate
    "tiny": (64, 2, 192, 3, 128, 8, 1e-2),
    "small": (128, 2, 384, 6, 256, 8, 1e-2),
    "base": (256, 4, 704, 6, 512, 8, 5e-3),
}
"""``small`` learns most in about five minutes on two cores (docs/studies/loop-recipe.md); ``base`` is for hours."""


def gpt(size: str = "small") -> Recipe:
    """A pre-norm Llama-shaped decoder (RoPE, SwiGLU, tied embedding)."""
    hidden, heads, intermediate, blocks, sequence, batch, rate = _SIZES[size]
    return Recipe(
        name="gpt",
        description="plain decoder, every block used once",
        model=ModelSpec(
            layout=str(blocks),
            hidden_size=hidden,
            block=BlockSpec(mixer=AttentionSpec(num_heads=heads), ffn=FeedForwardSpec(intermediate_size=intermediate)),
        ),
        data=DataSpec(sequence_length=sequence),
        optim=OptimSpec(lr=rate, embedding_lr=2 * rate),
        train=TrainSpec(batch_size=batch),
    )
