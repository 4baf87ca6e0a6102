"""Study: is the loop count of a trained model a dial? One model trained with its fixed count, one with random counts.

Both have the same layout and read the same windows in the same order; each is scored on the same held-out text with 1
to 16 loops. The option is ``train.loops.sampling``. Prints one line of JSON: the score by loop count, and for each seed
by which share the worst count from the trained one to twice that is above the model's best of all (``above_best``; 0.01
is 1 %).

    python runs/depth_dial.py --tokens 2000000 --seeds 0,1,2 --out work

Each run and each score is kept in OUT, and the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from loop_search import prepare, trained

MOST = 16
"""Loops that are scored, at most."""


def main() -> None:
    """Train what is missing, score it, and say how far the dial turns."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--out", type=Path, required=True, help="working directory, of one text; what is finished in it is kept"
    )
    options.add_argument("--layout", default="(2)x4")
    options.add_argument("--size", default="small", help="of recipe loop")
    options.add_argument("--seeds", default="0,1,2", help="seeds, separated by commas")
    options.add_argument("--data", default="python:", help="training text")
    options.add_argument("--tokenizer", default="bpe:2048")
    options.add_argument("--tokens", type=int, default=2_000_000, help="training tokens of each run")
    options.add_argument("--sampling", default="uniform", choices=("uniform", "poisson"), help="of random counts")
    options.add_argument("--least", type=int, help="smallest random count; by default half of the layout's")
    options.add_argument("--max-bytes", type=int, default=100_000, help="held-out bytes scored")
    options.add_argument("--threads", type=int, default=1)
    chosen = options.parse_args()
    prepare(chosen.out, chosen.threads)
    arms: dict[str, list[dict[int, float]]] = {"fixed": [], "random": []}
    for seed in map(int, chosen.seeds.split(",")):
        for arm, found in arms.items():
            found.append(_scores(chosen, arm, seed))
            print(arm, seed, found[-1], file=sys.stderr, flush=True)
    loops = _recipe(chosen, "fixed", 0).model.schedule.loops
    results = {arm: _summary(found, loops) for arm, found in arms.items()}
    said = {name: getattr(chosen, name) for name in ("layout", "size", "data", "tokens", "sampling", "seeds")}
    print(json.dumps({"study": "depth_dial", **said, "trained_loops": loops, **results}))


def _summary(scores: list[dict[int, float]], loops: int) -> dict[str, Any]:
    """Mean scores by loop count, and how much worse the counts from ``loops`` to twice that are than the best one."""
    above = [max(found[n] for n in range(loops, 2 * loops + 1)) / min(found.values()) - 1 for found in scores]
    means = {count: round(fmean(found[count] for found in scores), 4) for count in scores[0]}
    return {"bits_per_byte": means, "above_best": [round(share, 4) for share in above]}


def _recipe(chosen: argparse.Namespace, arm: str, seed: int) -> Any:
    from ouroboros.config import LoopTraining
    from ouroboros.recipes import recipe

    base = recipe("loop", chosen.size)
    model = base.model.replace(layout=chosen.layout)
    loops = model.schedule.loops
    counts = LoopTraining()
    if arm == "random":
        bounds = {"min": chosen.least or max(1, loops // 2), "max": 2 * loops}
        mean = {"mean": float(loops)} if chosen.sampling == "poisson" else {}
        counts = LoopTraining(sampling=chosen.sampling, **bounds, **mean)
    fixed = {"eval_every": 0, "checkpoint_every": 200, "keep_last": 1}
    train = dataclasses.replace(base.train, tokens=chosen.tokens, seed=seed, loops=counts, **fixed)
    data = dataclasses.replace(base.data, sources=(chosen.data,), tokenizer=chosen.tokenizer)
    return dataclasses.replace(base, model=model, train=train, data=data)


def _scores(chosen: argparse.Namespace, arm: str, seed: int) -> dict[int, float]:
    """Bits per byte by loop count of one run, which is trained and scored as far as it has not been."""
    from ouroboros.eval.score import score
    from ouroboros.files import write_whole

    recipe = _recipe(chosen, arm, seed)
    how = f"{chosen.sampling}-{recipe.train.loops.min}" if arm == "random" else arm
    name = f"{chosen.size}-{chosen.layout}-{chosen.tokens}-{how}-{seed}".translate(str.maketrans(" ", "_", "()"))
    kept = chosen.out / f"{name}.json"
    found = {int(count): bits for count, bits in json.loads(kept.read_text()).items()} if kept.is_file() else {}
    wanted = [count for count in range(1, max(MOST, 2 * recipe.model.schedule.loops) + 1) if count not in found]
    if wanted:
        opened = trained(recipe, chosen.out / name)
        test, window = opened.run.open_data().documents("test"), recipe.data.sequence_length
        for count in wanted:
            scored = score(opened.model, opened.tokenizer, test, window=window, loops=count, max_bytes=chosen.max_bytes)
            found[count] = round(scored.bits_per_byte, 5)
            write_whole(kept, json.dumps(found).encode())
    return dict(sorted(found.items()))


if __name__ == "__main__":
    main()
