"""The published Helix: width of the bridges, how often the second stream runs, linear against attention bridges.

    ouroboros ablate ablations/2026-11-29-helix-switches/study.py --data books_train.txt --out work

In the published runs most bridges were zero and never trained (docs/systems/crawler.md). Here `ouroboros ablate` proves
every arm alive before it trains.
"""

import dataclasses
from typing import Any

from ouroboros.ablate.changes import changed
from ouroboros.ablate.study import Arm, Packing, Stage, Study
from ouroboros.ablate.twins import arm
from ouroboros.recipes import recipe
from ouroboros.systems.crawler.recipe import settings_of, trained

helix = changed(recipe("helix", "tiny"), {"train.compile": "off"})
SETTINGS = dataclasses.replace(
    settings_of("tiny"),
    num_flat_layers=4,
    crawler_mlp_mult=3.0,
    crawler_loop_rope_scales=(9.0,),
    helix_enabled=True,
    helix_dim=16,
)


def made(name: str, **settings: Any) -> Arm:
    """The recipe with four flat blocks, and these settings of the published program."""
    changed_recipe = dataclasses.replace(helix, model=trained(dataclasses.replace(SETTINGS, **settings)))
    return arm(name, control.recipe, changed_recipe)


control = Arm(name="helix", recipe=dataclasses.replace(helix, model=trained(SETTINGS)))
STUDY = Study(
    name="helix-switches",
    question="Does Helix's second stream pay, how wide must its bridges be, and is attention better than linear maps?",
    control=control,
    arms=(
        made("bridge-8", helix_dim=8),
        made("bridge-64", helix_dim=64),
        made("stride-2", helix_stride=2),
        made("stride-4", helix_stride=4),
        made("attention-16", helix_cross_attn=True),
        made("no-helix", helix_enabled=False, crawler_loop_rope_scales=(9.0, 1.0), crawler_loops=2),
        made("six-flat", num_flat_layers=6),
    ),
    seeds=(1, 2, 3),
    stages=(Stage(name="short", tokens=300_000),),
    packing=Packing(bits=6),
    repeats=1,
    score_bytes=100_000,
)
