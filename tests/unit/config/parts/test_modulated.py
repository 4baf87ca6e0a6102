"""What modulated maps need of a model, and what they cost."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ouroboros.config import BlockOverride, ModelSpec
from ouroboros.config.parts.delta import DeltaSpec
from ouroboros.config.parts.modulated import (
    ControllerSpec,
    ModulatedAttentionSpec,
    ModulatedFeedForwardSpec,
    StaticCoresSpec,
    StaticDiagonalsSpec,
    modulated,
)
from ouroboros.errors import OuroborosError

D, HEADS, INNER, RANK, STYLE = 16, 2, 24, 3, 5
MIXER = {"kind": "modulated_attention", "num_heads": HEADS, "rank": RANK}
FFN = {"kind": "modulated_swiglu", "intermediate_size": INNER, "rank": RANK}


def model(*loop: Any, where: str = "loop", mixer: Any = MIXER, ffn: Any = FFN, **changes: Any) -> ModelSpec:
    """A model whose loop is modulated."""
    override = BlockOverride(where=where, set={"mixer": mixer, "ffn": ffn})
    return ModelSpec(layout="1 loop:(1)x2 1", vocab_size=11, hidden_size=D, loop=loop, overrides=(override,), **changes)


def test_published_counts() -> None:
    """Section 3 of the specification, Qwen2.5-3B at ranks 8, 32 and 64."""
    for rank, controller, bases in ((8, 671_360, 415_744), (32, 692_864, 1_662_976), (64, 721_536, 3_325_952)):
        mixer = ModulatedAttentionSpec(num_heads=16, num_kv_heads=2, rank=rank)
        ffn = ModulatedFeedForwardSpec(intermediate_size=11008, rank=rank)
        assert ControllerSpec(rank=rank, rows=64).parameters(2048, loops=8) == controller
        assert mixer.bases_parameters(2048) + ffn.bases_parameters(2048) == bases
    assert StaticDiagonalsSpec(rows=64).parameters(2048, loops=8) == 14_336


def test_counts_of_full_cores_and_of_bases_of_each_loop() -> None:
    """Of LoRA-XS, section 3: rank squared numbers for each map and loop; and what they add to the work of a token."""
    assert StaticCoresSpec(rank=4).parameters(2048, loops=3) == 3 * 7 * 4 * 4
    diagonal, full = (ControllerSpec(rank=4, style=STYLE, core=core) for core in ("diagonal", "full"))  # pyrefly: ignore
    assert full.parameters(D, loops=2) - diagonal.parameters(D, loops=2) == STYLE * 7 * (16 - 4)
    for cls, maps in ((ModulatedAttentionSpec, 4), (ModulatedFeedForwardSpec, 3)):
        usual, rows, cores = cls(rank=4), cls(rank=4, rows=3), cls(rank=4, core="full")
        assert rows.parameters(D) - usual.parameters(D) == 2 * usual.bases_parameters(D)
        context = (100,) if cls is ModulatedAttentionSpec else ()
        assert rows.flops(D, *context) == usual.flops(D, *context) == cores.flops(D, *context) - maps * 2 * 16


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: model(), "block 1 needs a loop part that hands it diagonals or cores: --model.loop.controller"),
        (lambda: model(ControllerSpec(rank=RANK), where="0"), "of block 0 is modulated by a loop, and is visited out"),
        (
            lambda: dataclasses.replace(model(ControllerSpec(rank=RANK)), layout="1 loop:1 (loop)x2 1"),
            "of block 1 is modulated by a loop, and is visited outside of one",
        ),
        (lambda: model(ControllerSpec(rank=4)), r"loop.controller.rank is 4, and mixer.rank of block 1 3"),
        (lambda: model(StaticDiagonalsSpec(rank=RANK), ffn="gelu"), "ffn of block 1 is 'gelu'.*--model.at.loop.ffn"),
        (
            lambda: model(ControllerSpec(rank=RANK), StaticDiagonalsSpec(rank=RANK)),
            "loop.controller and loop.static_diagonals both hand what stands between A and B: leave one",
        ),
        (
            lambda: model(ControllerSpec(rank=RANK, pooling="prompt"), share_last_kv=True),
            "pooling 'prompt' remembers something in every loop, and share_last_kv",
        ),
        (
            lambda: model(ControllerSpec(rank=RANK)).replace(residual=DeltaSpec(values=2, compressor="token")),
            "one vector: --model.residual additive",
        ),
        (lambda: ModulatedAttentionSpec(rank=0), "mixer.rank must be >= 1, got 0"),
        (lambda: ModulatedFeedForwardSpec(alpha=0.0), "ffn.alpha must be > 0, got 0"),
        (lambda: model(StaticCoresSpec(rank=RANK)), "makes a full core, and mixer.core of block 1 is 'diagonal': give"),
        (
            lambda: model(ControllerSpec(rank=RANK), mixer={**MIXER, "core": "full"}),
            "makes a diagonal core, and mixer.core of block 1 is 'full': give --model.at.loop.mixer.core diagonal",
        ),
        (lambda: ModulatedFeedForwardSpec(rows=0), "ffn.rows must be >= 1 or null, got 0"),
        (lambda: ControllerSpec(rank=0), "loop.controller.rank must be >= 1"),
        (lambda: StaticDiagonalsSpec(rows=0), "loop.static_diagonals.rows must be >= 1"),
        (lambda: ControllerSpec(style=0), "loop.controller.style must be >= 1"),
        (lambda: ControllerSpec(prompt=0), "loop.controller.prompt must be >= 1"),
    ],
)
def test_what_does_not_fit_is_refused(build: Any, message: str) -> None:
    with pytest.raises(OuroborosError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


def test_frozen_bases_are_declared() -> None:
    assert ModulatedAttentionSpec().freezes and ModulatedFeedForwardSpec().freezes
    assert not ModulatedAttentionSpec(bases="trained").freezes
    assert not ModulatedFeedForwardSpec(bases="trained").freezes


def test_looped_blocks_are_modulated_and_keep_what_is_their_own() -> None:
    """Those of a named segment by its name where they are equal, others by their numbers."""
    windows = BlockOverride(where="2", set={"mixer.window": 5})
    plain = ModelSpec(layout="1 loop:(2)x2 (1)x3", vocab_size=11, hidden_size=D, overrides=(windows,))
    made = modulated(plain, (StaticCoresSpec(rank=RANK),), rank=RANK, alpha=2.0, trained=True, by_loop=True)
    assert [override.where for override in made.overrides] == ["2", "1", "2", "3"]
    assert [block.mixer.kind for block in made.blocks] == ["attention"] + 3 * ["modulated_attention"]
    assert [block.mixer.looks_back for block in made.blocks] == [None, None, 5, None]
    mixer: Any = made.blocks[2].mixer
    assert (mixer.rank, mixer.alpha, mixer.bases, mixer.rows, mixer.core) == (RANK, 2.0, "trained", 2, "full")
    last: Any = made.blocks[3].ffn
    assert last.rows == 3
    equal = modulated(dataclasses.replace(plain, overrides=()), (ControllerSpec(rank=RANK),), rank=RANK, alpha=1.0)
    assert [override.where for override in equal.overrides] == ["loop", "3"]
    assert modulated(plain, (), rank=RANK, alpha=1.0) == plain
