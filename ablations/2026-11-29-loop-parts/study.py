"""What makes a loop better: how often it runs, when it begins, and what enters and leaves it.

    ouroboros ablate ablations/2026-11-29-loop-parts/study.py --data books_train.txt --out work

Two stored blocks of width 64 that are visited four times, and the state before the loop added again in every loop. An
arm that has further parameters has narrower feed-forward networks, so that all arms store equally many.
"""

import dataclasses
from typing import Any

from ouroboros.ablate.changes import changed
from ouroboros.ablate.study import Arm, Packing, Stage, Study
from ouroboros.ablate.twins import arm
from ouroboros.recipes import recipe
from ouroboros.recipes.twin import equal_size

LOOP = changed(
    recipe("loop", "tiny"),
    {
        "model.layout": "(2)x4",
        "model.loop.inject": {"mode": "add"},
        "data.sequence_length": 256,
        "train.eval_every": 0,
        "train.compile": "on",
    },
)
ARMS: dict[str, dict[str, Any]] = {
    "loops-1": {"model.layout": "2", "model.loop.inject": None},
    "loops-2": {"model.layout": "(2)x2"},
    "loops-3": {"model.layout": "(2)x3"},
    "loops-6": {"model.layout": "(2)x6"},
    "loops-8": {"model.layout": "(2)x8"},
    "late": {"train.loops.curriculum": [[0.0, 1], [0.4, 3], [0.65, 4]]},
    "no-injection": {"model.loop.inject": None},
    "concat": {"model.loop.inject": {"mode": "concat"}},
    "pre-norm": {"model.block.norm.placement": "pre"},
    "loop-norm": {"model.loop.norm": {}},
    "gate": {"model.loop.gate": {}},
    "update-gate": {"model.loop.update_gate": {}},
    "embedding": {"model.loop.embedding": {}},
    "hyper": {"model.loop.hyper": {}},
    "depth-scaled": {"model.output_init": "depth_scaled"},
}


def made(name: str, changes: dict[str, Any]) -> Arm:
    """The control with these changes, and as many stored parameters."""
    found = changed(LOOP, changes)
    sized = dataclasses.replace(found, model=equal_size(found.model, LOOP.model))
    return dataclasses.replace(arm(name, LOOP, sized), late=name == "late")


STUDY = Study(
    name="loop-parts",
    question="How many loops, from when on, and with what at their boundaries?",
    control=Arm(name="loop", recipe=LOOP),
    arms=tuple(made(name, changes) for name, changes in ARMS.items()),
    seeds=(1, 2, 3),
    stages=(Stage(name="short", tokens=1_000_000),),
    packing=Packing(bits=6),
    repeats=1,
    score_bytes=100_000,
)
