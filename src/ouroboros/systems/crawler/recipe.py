"""``crawler``: a U-net of blocks around shared ones; ``helix``: two streams side by side (docs/systems/crawler.md)."""

from __future__ import annotations

import dataclasses

from ouroboros.config import DataSpec, ModelSpec, OptimSpec, Recipe, TrainSpec
from ouroboros.recipes import RecipeEntry
from ouroboros.systems.crawler.published import Published

_SIZES = {
    # hidden, heads, key/value heads, flat blocks, vocabulary, sequence, batch
    "tiny": (64, 2, 1, 2, "bytes", 128, 8),
    "small": (128, 4, 2, 5, "bpe:2048", 256, 8),
    "base": (256, 4, 2, 7, "bpe:4096", 512, 8),
}


def settings_of(size: str) -> Published:
    """The published form at a size of ours, with nothing in it that would never train."""
    hidden, heads, kv_heads, flats, tokenizer, *_ = _SIZES[size]
    return Published(
        num_flat_layers=flats,
        vocab_size=257 if tokenizer == "bytes" else int(tokenizer.removeprefix("bpe:")),
        model_dim=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        crawler_mlp_mult=6.0,
        rope_dims=hidden // heads // 4 * 2,
        crawler_loop_rope_scales=(9.0, 1.0),
        qk_gain_init=4.0,
        bigram_vocab_size=512 if size == "tiny" else 2048,
        bigram_dim=hidden // 4,
        ve_dim=hidden // 4,
        ve_layers="0",
        inst_dim=hidden // 8,
    )


def _recipe(name: str, description: str, model: ModelSpec, size: str) -> Recipe:
    *_, tokenizer, sequence, batch = _SIZES[size]
    rate = 5e-3 if size == "base" else 1e-2
    return Recipe(
        name=name,
        description=description,
        model=model,
        data=DataSpec(tokenizer=tokenizer, sequence_length=sequence),
        optim=OptimSpec(lr=rate, embedding_lr=2 * rate),
        train=TrainSpec(batch_size=batch),
    )


def trained(settings: Published) -> ModelSpec:
    """The model of the settings, with rotations that stay the same for every length of text, and a second stream, if
    there is one, that changes nothing at the start: the published form adds half of it then."""
    model = settings.model(4096)
    rope = model.block.mixer.rope  # pyrefly: ignore[missing-attribute]
    mixer = model.block.mixer.replace(rope=dataclasses.replace(rope, original_context=None))
    model = dataclasses.replace(model, block=dataclasses.replace(model.block, mixer=mixer), embedding_std=None)
    return (
        dataclasses.replace(model, topology=model.topology.replace(merge="linear")) if settings.helix_enabled else model
    )


def crawler(size: str = "small") -> Recipe:
    """The submission's form: blocks of a U-net around one wider block that is used twice, all of which trains."""
    return _recipe("crawler", "a U-net of blocks around a shared one", trained(settings_of(size)), size)


def helix(size: str = "small") -> Recipe:
    """Two streams: a U-net of blocks, and a shared block that runs beside it after every other one of them."""
    settings = settings_of(size)
    width = settings.model_dim // 4
    settings = dataclasses.replace(
        settings,
        crawler_mlp_mult=3.0,
        crawler_loop_rope_scales=(9.0,),
        helix_enabled=True,
        helix_dim=width,
        helix_stride=1 if settings.flats < 4 else 2,
    )
    return _recipe("helix", "two streams side by side", trained(settings), size)


def crawler_published(size: str = "default") -> Recipe:
    """The submission as published, its parameters that never trained included; ``tiny`` is for trying things out."""
    settings = Published(
        num_flat_layers=9,
        crawler_mlp_mult=6.0,
        crawler_loop_rope_scales=(9.0, 1.0),
        qk_gain_init=4.0,
        keep_unconnected=True,
    )
    if size == "tiny":
        small = {"num_flat_layers": 2, "model_dim": 64, "num_heads": 2, "num_kv_heads": 1, "ve_dim": 8, "inst_dim": 8}
        settings = dataclasses.replace(settings, **small, bigram_vocab_size=64, bigram_dim=8)
    return Recipe(
        name="crawler-published",
        description="crawler as published: parts of it never trained",
        model=settings.model(2048),
        data=DataSpec(tokenizer="bpe:1024", sequence_length=2048 if size == "default" else 64),
        optim=OptimSpec(
            lr=0.03,
            embedding_lr=0.035,
            vector_lr=0.025,
            weight_decay=0.04,
            decay="all",
            muon_momentum=0.99,
            muon_momentum_start=0.92,
            muon_momentum_warmup=1500,
            muon_form="original",
            warmup_fraction=0.0,
            decay_steps=2000,
            clip_norm=0.3,
            left_out=("*.loops.*.flow.*",),
        ),
        train=TrainSpec(batch_size=384 if size == "default" else 8),
    )


CRAWLER = RecipeEntry(make=crawler)
HELIX = RecipeEntry(make=helix)
CRAWLER_PUBLISHED = RecipeEntry(
    make=crawler_published, sizes=("tiny", "default"), aliases={"small": "default", "base": "default"}
)
