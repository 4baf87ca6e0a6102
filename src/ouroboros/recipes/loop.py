"""``loop``: the flagship. Unshared prelude and coda, a few middle blocks visited several times."""

from __future__ import annotations

import dataclasses

from ouroboros.config import Recipe, RMSNormSpec
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
