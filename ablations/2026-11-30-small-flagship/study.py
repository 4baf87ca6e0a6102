"""Does a loop pay at equal stored parameters, when a very small model is trained for long?

    ouroboros ablate ablations/2026-11-30-small-flagship/study.py --data books_train.txt --out work

Two stored blocks that are visited four times, with the three parts between the loops that did best before, against
plain models of as many stored parameters: ``plain`` has as many blocks, ``deep`` as many visits and is narrower, and
``four`` lies between them, because neither twin needs to be the best plain model. 0.13 million parameters, bytes, 45
tokens for each parameter. It was chosen with another seed and on another text (docs/studies/loop-recipe.md).
"""

import dataclasses
from typing import Any

from ouroboros.ablate.changes import changed
from ouroboros.ablate.study import Arm, Packing, Stage, Study
from ouroboros.ablate.twins import arm, twins_of
from ouroboros.config import Recipe
from ouroboros.config.parts import loop as parts
from ouroboros.recipes import recipe
from ouroboros.recipes.twin import equal_size

SHARED = {
    "data.tokenizer": "bytes",
    "data.sequence_length": 256,
    "model.vocab_size": 257,
    "train.batch_size": 8,
    "train.eval_every": 0,
    "train.telemetry_every": 0,
    "train.compile": "on",
}


def with_layout(layout: str, width: int, *between: Any) -> Recipe:
    """The recipe ``loop`` with this layout, its feed-forward networks three times as wide as the model."""
    made = changed(recipe("loop", "tiny"), SHARED)
    ffn = made.model.block.ffn.replace(intermediate_size=3 * width)
    block = dataclasses.replace(made.model.block, ffn=ffn)
    return dataclasses.replace(
        made, model=made.model.replace(layout=layout, hidden_size=width, block=block, loop=between)
    )


FOUR = dataclasses.replace(with_layout("4", 48), name="four")
LOOP = with_layout("(2)x4", 64, parts.InjectionSpec(mode="add"), parts.LoopEmbeddingSpec(), parts.LoopNormSpec())
LOOP = dataclasses.replace(LOOP, model=equal_size(LOOP.model, FOUR.model))
STUDY = Study(
    name="small-flagship",
    question="Does a loop pay at equal stored parameters, when a very small model is trained for long?",
    control=Arm(name="loop", recipe=LOOP),
    arms=(arm("four", LOOP, FOUR), *twins_of(LOOP, "parameters")),
    seeds=(1, 2, 3, 4, 5),
    stages=(Stage(name="long", tokens=6_000_000),),
    packing=Packing(bits=6),
    score_bytes=300_000,
)
