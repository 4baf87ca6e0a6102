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


def arm(name: str, **changes: object) -> Arm:
    """The control with some fields changed; two underscores stand for a dot."""
    return Arm.changing(control, name, {path.replace("__", "."): value for path, value in changes.items()})


ARMS = (
    arm("no-flow", model__loop__flow=None),
    arm("tap", model__loop__tap={"width": 16}),
    arm("tap-shared", model__loop__tap={"width": 16, "per_loop": False}),
    arm("anchor", model__loop__anchor={"width": 16}),
    arm("loop-smear", model__loop__loop_smear={}),
    arm("no-smear", model__stem__smear=None),
    arm("divisors-1", model__overrides=_shared_block(**{"mixer.rope.loop_scales": [1.0, 1.0]})),
    arm("divisors-1-9", model__overrides=_shared_block(**{"mixer.rope.loop_scales": [1.0, 9.0]})),
    arm("choke-flat", model__overrides=_choke("flat")),
    arm("choke-pyramid", model__overrides=_choke("pyramid")),
    arm("choke-residual", model__overrides=_choke("residual")),
    arm("no-xsa", model__overrides=_shared_block(**{"mixer.exclusive": False})),
    arm("xsa-everywhere", model__block__mixer__exclusive=True),
    arm("leaky-0.25", model__overrides=_slope(0.25)),
    arm("leaky-0.5", model__overrides=_slope(0.5)),
    arm("noisy-training", train__quantize__mode="noise"),
    arm("contractive-0.5", model__loop__contractive={"step": 0.5}),
    arm("loops-1", model__layout="1 crawler:(1)x1 1"),
    arm("loops-3", model__layout="1 crawler:(1)x3 1"),
)

STUDY = Study(
    name="crawler-switches",
    question="Which of the published crawler's switches change the score, before packing and after it?",
    control=control,
    arms=ARMS,
    seeds=(1, 2, 3),
    stages=(Stage(name="short", tokens=300_000),),
    packing=Packing(bits=6),
    repeats=1,
    score_bytes=100_000,
)
