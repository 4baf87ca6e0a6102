"""``loop``: unshared prelude and coda, a few middle blocks visited several times; and the recipe's other layouts."""

from __future__ import annotations

import dataclasses

from ouroboros.config import Recipe, RMSNormSpec
from ouroboros.config.parts.loop import InjectionSpec, LoopEmbeddingSpec, LoopNormSpec
from ouroboros.config.parts.stem import EmbeddingNormSpec
from ouroboros.recipes.gpt import gpt

_LAYOUTS = {"tiny": "1 (1)x2 1", "small": "2 (2)x2 2", "base": "2 (2)x2 2"}
_PORTABLE = {"tiny": "(2)x2", "small": "(4)x2", "base": "(4)x2"}
"""As many visits as the layouts above have."""


def loop(size: str = "small") -> Recipe:
    """The plain decoder's parts in a looped layout, with sandwich norm and norms of embeddings, queries and keys.

    What the norms bring is in docs/studies/loop-recipe.md.
    """
    plain = gpt(size)
    block = plain.model.block
    mixer = block.mixer.replace(qk_norm="before_rope")
    return dataclasses.replace(
        plain,
        name="loop",
        description="prelude, looped middle, coda; sandwich norm",
        model=dataclasses.replace(
            plain.model,
            layout=_LAYOUTS[size],
            block=dataclasses.replace(block, mixer=mixer, norm=RMSNormSpec(placement="sandwich")),
            stem=(EmbeddingNormSpec(),),
        ),
        optim=dataclasses.replace(plain.optim, muon_momentum=0.9),
    )


def loop_long(size: str = "small") -> Recipe:
    """Two blocks that are all there is, visited four times: for a model of few bytes that is trained for long.

    Trained on 45 tokens for each parameter it is better than every plain model of as many parameters that it was
    compared with, at 3.4 times the work for each token (ablations/2026-11-30-small-flagship). Trained for minutes,
    ``loop`` is better.
    """
    made = loop(size)
    model = made.model.replace(
        layout="(2)x4",
        ffn=made.model.block.ffn.replace(intermediate_size=made.model.hidden_size * 27 // 8),
        loop=(InjectionSpec(mode="add"), LoopEmbeddingSpec(), LoopNormSpec()),
    )
    return dataclasses.replace(
        made,
        name="loop-long",
        description="two blocks visited four times, for long training of few bytes",
        model=model,
        data=dataclasses.replace(made.data, sequence_length=max(256, made.data.sequence_length)),
    )


def loop_portable(size: str = "small") -> Recipe:
    """The plain decoder's parts and all of its blocks in one loop, which other tools run as a stack that is repeated.

    Prelude, coda and further norms have no place in their form (docs/how-to/export.md).
    """
    plain = gpt(size)
    return dataclasses.replace(
        plain,
        name="loop-portable",
        description="all blocks of the plain decoder in one loop, for llama.cpp",
        model=dataclasses.replace(plain.model, layout=_PORTABLE[size]),
        optim=dataclasses.replace(plain.optim, muon_momentum=0.9),
    )
