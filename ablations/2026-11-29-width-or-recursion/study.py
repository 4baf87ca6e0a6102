"""Width or recursion? What a loop saves in parameters can be spent on width: which of the two is it that helps?

    ouroboros ablate ablations/2026-11-29-width-or-recursion/study.py --data books_train.txt --out work

Two stored blocks, narrow or wide, visited once or four times: neither, width alone, the loop alone, and both. A plain
model of four blocks has the narrow width and as many stored parameters as the wide ones (within 1 %): against it,
``both`` is what a loop offers. The published statement was "85 % width, 15 % regularisation, 0 % recursion", from one
seed.
"""

import dataclasses

from ouroboros.ablate.changes import changed
from ouroboros.ablate.study import Arm, Packing, Stage, Study
from ouroboros.ablate.twins import arm
from ouroboros.config import Recipe
from ouroboros.recipes import recipe
from ouroboros.recipes.twin import equal_size

NARROW, WIDE = 48, 64


def sized(layout: str, width: int) -> Recipe:
    """A model of this layout and width, its feed-forward networks three times as wide."""
    values = {
        "model.layout": layout,
        "model.hidden_size": width,
        "model.block.ffn.intermediate_size": 3 * width,
        "data.sequence_length": 256,
        "train.eval_every": 0,
        "train.compile": "on",
    }
    return changed(recipe("loop", "tiny"), values)


BOTH, FLAT = sized("(2)x4", WIDE), sized("4", NARROW)
CONTROL = dataclasses.replace(FLAT, model=equal_size(FLAT.model, BOTH.model))
STUDY = Study(
    name="width-or-recursion",
    question="Is it the width that a loop pays for, or the loop itself?",
    control=Arm(name="flat", recipe=CONTROL),
    arms=(
        arm("neither", CONTROL, sized("2", NARROW)),
        arm("width", CONTROL, sized("2", WIDE)),
        arm("loop", CONTROL, sized("(2)x4", NARROW)),
        arm("both", CONTROL, BOTH),
    ),
    seeds=(1, 2, 3),
    stages=(Stage(name="short", tokens=1_000_000),),
    packing=Packing(bits=6),
    repeats=1,
    score_bytes=100_000,
)
