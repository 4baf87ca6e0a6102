"""Study: what the norms and the momentum of recipe `loop` bring in a short run. Paired seeds, equal steps.

Arms leave one thing out of the recipe (norm of embeddings, of queries and keys, momentum 0.9 instead of 0.95), all of
them, or take a rate twice as high. Prints one line of JSON with the difference of each arm from the recipe and its 95 %
interval over seeds; positive means that leaving it out is worse. `docs/studies/loop-recipe.md` tells what came out.

    python runs/loop_norms.py --steps 200 --seeds 3 --out work
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from delta_study import measure


def main() -> None:
    """Train every arm, score it on the held-out files, and compare it with the recipe seed by seed."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--max-bytes", type=int, default=100_000, help="held-out bytes scored")
    options.add_argument("--arms", default="recipe,none", help="names, separated by commas; recipe comes first")
    options.add_argument("--out", type=Path, required=True, help="working directory; finished runs in it are kept")
    chosen = options.parse_args()
    from transformers.utils import logging

    from ouroboros.eval.stats import mean_interval

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    made, names = arms(chosen.steps), chosen.arms.split(",")
    scores: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(chosen.seeds):
        for name in names:
            run = chosen.out / f"{name.replace(' ', '-')}-{chosen.steps}-{seed}"
            scores[name].append(measure(made[name], seed, run, chosen.max_bytes))
            print(name, seed, f"{scores[name][-1]:.4f}", file=sys.stderr, flush=True)
    differences = {
        name: dataclasses.asdict(mean_interval([a - b for a, b in zip(found, scores["recipe"], strict=True)]))
        for name, found in scores.items()
        if name != "recipe"
    }
    print(json.dumps({"study": "loop_norms", "steps": chosen.steps, "bits_per_byte": scores, "worse_by": differences}))


def arms(steps: int) -> dict[str, Any]:
    """The recipe of the demo, and what is left out of it."""
    from ouroboros.recipes import recipe

    made = recipe("loop", "small")
    made = dataclasses.replace(
        made,
        data=dataclasses.replace(made.data, sources=("python:",), tokenizer="bpe:2048"),
        train=dataclasses.replace(made.train, steps=steps, eval_every=0, checkpoint_every=0),
    )

    def changed(optim: dict[str, Any] | None = None, qk_norm: str = "before_rope", embedding_norm: bool = True) -> Any:
        stem = made.model.stem if embedding_norm else ()
        model = made.model.replace(mixer=made.model.block.mixer.replace(qk_norm=qk_norm), stem=stem)
        return dataclasses.replace(made, model=model, optim=dataclasses.replace(made.optim, **(optim or {})))

    return {
        "recipe": made,
        "none": changed({"muon_momentum": 0.95}, "none", False),
        "no embedding norm": changed(embedding_norm=False),
        "no query and key norm": changed(qk_norm="none"),
        "momentum 0.95": changed({"muon_momentum": 0.95}),
        "rate doubled": changed({"lr": 2 * made.optim.lr}),
    }


if __name__ == "__main__":
    main()
