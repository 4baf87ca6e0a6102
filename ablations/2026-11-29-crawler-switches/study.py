"""The published crawler's switches, each tried alive: score before and after packing, and the gap between them.

    ouroboros ablate ablations/2026-11-29-crawler-switches/study.py --data books_train.txt --out work

Most of these switches did nothing in the published runs, because their parameters were in no optimiser
(docs/systems/crawler.md). Here `ouroboros ablate` proves every arm alive before it trains.
"""

from ouroboros.ablate.changes import changed
from ouroboros.ablate.study import Arm, Packing, Stage, Study
from ouroboros.config import to_dict
from ouroboros.recipes import recipe

control = Arm(name="crawler", recipe=changed(recipe("crawler", "tiny"), {"train.compile": "off"}))


def _shared_block(**values: object) -> list[dict[str, object]]:
    """The overrides of the recipe, with other values for the shared block (number 1)."""
    found = to_dict(control.recipe.model)["overrides"]
    return [{**one, "set": {**one["set"], **values}} if one["where"] == "1" else one for one in found]


def _choke(shape: str) -> list[dict[str, object]]:
    return _shared_block(ffn={"kind": "choke", "intermediate_size": 384, "shape": shape, "choke_size": 32})


def _slope(slope: float) -> list[dict[str, object]]:
    """The square of a leaky rectifier; with the published one, a square, the slope was never used."""
    return _shared_block(ffn={"kind": "leaky_relu2", "intermediate_size": 384, "negative_slope": slope})


ARMS = {
    "no-flow": {"model.loop.flow": None},
    "tap": {"model.loop.tap": {"width": 16}},
    "tap-shared": {"model.loop.tap": {"width": 16, "per_loop": False}},
    "anchor": {"model.loop.anchor": {"width": 16}},
    "loop-smear": {"model.loop.loop_smear": {}},
    "no-smear": {"model.stem.smear": None},
    "divisors-1": {"model.overrides": _shared_block(**{"mixer.rope.loop_scales": [1.0, 1.0]})},
    "divisors-1-9": {"model.overrides": _shared_block(**{"mixer.rope.loop_scales": [1.0, 9.0]})},
    "choke-flat": {"model.overrides": _choke("flat")},
    "choke-pyramid": {"model.overrides": _choke("pyramid")},
    "choke-residual": {"model.overrides": _choke("residual")},
    "no-xsa": {"model.overrides": _shared_block(**{"mixer.exclusive": False})},
    "xsa-everywhere": {"model.block.mixer.exclusive": True},
    "leaky-0.25": {"model.overrides": _slope(0.25)},
    "leaky-0.5": {"model.overrides": _slope(0.5)},
    "noisy-training": {"train.quantize.mode": "noise"},
    "contractive-0.5": {"model.loop.contractive": {"step": 0.5}},
    "loops-1": {"model.layout": "1 crawler:(1)x1 1"},
    "loops-3": {"model.layout": "1 crawler:(1)x3 1"},
}

STUDY = Study(
    name="crawler-switches",
    question="Which of the published crawler's switches change the score, before packing and after it?",
    control=control,
    arms=tuple(Arm.changing(control, name, changes) for name, changes in ARMS.items()),
    seeds=(1, 2, 3),
    stages=(Stage(name="short", tokens=300_000),),
    packing=Packing(bits=6),
    repeats=1,
    score_bytes=100_000,
)
