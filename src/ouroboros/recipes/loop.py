"""``loop``: the flagship. Unshared prelude and coda, a few middle blocks visited several times."""

from __future__ import annotations

import dataclasses

from ouroboros.config import AttentionSpec, NormSpec, Recipe
from ouroboros.recipes.gpt import gpt

_LAYOUTS = {"tiny": "1 (1)x2 1", "small": "2 (2)x2 2", "base": "2 (2)x2 2"}


def loop(size: str = "small") -> Recipe:
    """The plain decoder's parts in a looped layout, with sandwich norm and norms of embeddings, queries and keys.

    What the norms bring is in docs/studies/loop-recipe.md.
    """
    plain = gpt(size)
    attention = plain.model.mixer
    assert isinstance(attention, AttentionSpec)
    return dataclasses.replace(
        plain,
        name="loop",
        description="prelude, looped middle, coda; sandwich norm",
        model=dataclasses.replace(
            plain.model,
            layout=_LAYOUTS[size],
            norm=NormSpec(placement="sandwich"),
            mixer=dataclasses.replace(attention, qk_norm="before_rope"),
            embedding_norm=True,
        ),
        optim=dataclasses.replace(plain.optim, muon_momentum=0.9),
    )
