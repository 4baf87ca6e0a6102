"""``gpt``: the plain decoder. Control arm and starting point; Llama-shaped."""

from __future__ import annotations

from ouroboros.config import AttentionSpec, DataSpec, FeedForwardSpec, ModelSpec, OptimSpec, Recipe, TrainSpec

_SIZES = {
    # hidden, heads, intermediate, blocks, sequence, batch
    "tiny": (64, 4, 176, 2, 128, 8),
    "small": (256, 4, 704, 6, 512, 16),
    "base": (512, 8, 1408, 8, 1024, 16),
}


def gpt(size: str = "small") -> Recipe:
    """A pre-norm Llama-shaped decoder (RoPE, SwiGLU, tied embedding)."""
    hidden, heads, intermediate, blocks, sequence, batch = _SIZES[size]
    return Recipe(
        name="gpt",
        description="plain decoder, every block used once",
        model=ModelSpec(
            layout=str(blocks),
            hidden_size=hidden,
            mixer=AttentionSpec(num_heads=heads),
            ffn=FeedForwardSpec(intermediate_size=intermediate),
        ),
        data=DataSpec(sequence_length=sequence),
        optim=OptimSpec(),
        train=TrainSpec(batch_size=batch),
    )
