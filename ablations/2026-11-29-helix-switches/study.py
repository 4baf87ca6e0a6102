"""The published Helix: width of the bridges, how often the second stream runs, linear against attention bridges.

    ouroboros ablate ablations/2026-11-29-helix-switches/study.py --data books_train.txt --out work

In the published runs most bridges were zero and never trained (docs/systems/crawler.md). Here `ouroboros ablate` proves
every arm alive before it trains.
"""

import dataclasses

from ouroboros.ablate.changes import changed, differences
from ouroboros.ablate.study import Arm, Packing, Stage, Study
from ouroboros.recipes import recipe
from ouroboros.systems.crawler.published import Published

helix = changed(recipe("helix", "tiny"), {"train.compile": "off"})
SETTINGS = Published(
    num_flat_layers=4,
    vocab_size=257,
    model_dim=64,
    num_heads=2,
    num_kv_heads=1,
    rope_dims=16,
    crawler_mlp_mult=3.0,
    crawler_loop_rope_scales=(9.0,),
    qk_gain_init=4.0,
    bigram_vocab_size=512,
    bigram_dim=16,
    ve_dim=16,
    ve_layers="0",
    inst_dim=8,
    helix_enabled=True,
    helix_dim=16,
)


def made(name: str, **settings: object) -> Arm:
    """The recipe with four flat blocks, and these settings of the published program."""
    model = dataclasses.replace(SETTINGS, **settings).model(4096)
    topology = model.topology.replace(merge="linear") if settings.get("helix_enabled", True) else model.topology
    model = dataclasses.replace(model, topology=topology, embedding_std=None)
    arm = dataclasses.replace(helix, model=model)
    return Arm(name=name, recipe=arm, changes=tuple(differences(control.recipe, arm)) if name != "helix" else ())


control = made("helix")
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
