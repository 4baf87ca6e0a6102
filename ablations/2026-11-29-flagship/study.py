"""Does a loop pay at equal stored parameters, when a small model is trained for long?

    ouroboros ablate ablations/2026-11-29-flagship/study.py --data books_train.txt --out work

Two stored blocks that are visited four times, against plain models of as many stored parameters: ``plain`` has as many
blocks, ``deep`` as many visits and is narrower, and ``four`` lies between them, because neither twin needs to be the
best plain model. 0.34 million parameters, 20 tokens for each of them. What was tried before is in
docs/studies/loop-recipe.md; it was chosen with another seed and on another text.
"""

import dataclasses

from ouroboros.ablate.changes import changed
from ouroboros.ablate.study import Arm, Packing, Stage, Study
from ouroboros.ablate.twins import arm, twins_of
from ouroboros.config import Recipe
from ouroboros.config.parts import loop as parts
from ouroboros.recipes import recipe
from ouroboros.recipes.twin import equal_size

SHARED = {
    "data.tokenizer": "bpe:1024",
    "data.sequence_length": 256,
    "model.vocab_size": 1024,
    "train.batch_size": 8,
    "train.eval_every": 0,
    "train.telemetry_every": 0,
}


def looped() -> Recipe:
    """The looped model that the search chose."""
    made = changed(recipe("loop", "tiny"), SHARED)
    ffn = made.model.block.ffn.replace(intermediate_size=296)
    block = dataclasses.replace(made.model.block, ffn=ffn)
    loop = (parts.InjectionSpec(mode="add"),)
    return dataclasses.replace(made, model=made.model.replace(layout="(2)x4", hidden_size=96, block=block, loop=loop))


def four(made: Recipe) -> Recipe:
    """A plain model of four blocks, as many parameters, and the same norms."""
    model = made.model.replace(layout="4", hidden_size=72, loop=())
    return dataclasses.replace(made, name="four", model=equal_size(model, made.model))


LOOP = looped()
STUDY = Study(
    name="flagship",
    question="Does a loop pay at equal stored parameters, when a small model is trained for long?",
    control=Arm(name="loop", recipe=LOOP),
    arms=(arm("four", LOOP, four(LOOP)), *twins_of(LOOP, "parameters")),
    seeds=(1, 2, 3, 4, 5),
    stages=(Stage(name="long", tokens=7_000_000),),
    packing=Packing(bits=6),
    score_bytes=300_000,
)
