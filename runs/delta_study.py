"""Study: does the delta residual pay on the bundled text? Paired seeds, equal parameters, equal steps.

Arms: ``additive``; ``write-only`` (the delta residual that erases nothing: its control); ``delta`` (vector state);
``delta 4`` (four value channels, channel compressor, embedding convolution). Layouts: plain, and the same blocks with a
loop; on the plain one ``delta 4`` has controls of its own, ``write-only 4`` (without erasing) and ``delta 4 copies``
(without the embedding convolution). Arms of a seed see the same text in the same order. The feed-forward width makes up
for the residual's own parameters. Prints one line of JSON; `docs/studies/delta.md` tells what came out.

    python runs/delta_study.py --steps 400 --seeds 3 --out work
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

LAYOUTS = {"plain": "4", "loop": "1 (2)x2 1"}
BASES = ("additive", "write-only", "write-only 4", "delta 4 copies")
"""What the other arms of a layout are compared with."""


def main() -> None:
    """Train every arm, score it on the held-out files, and compare arms seed by seed."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=400)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--max-bytes", type=int, default=100_000, help="held-out bytes scored")
    options.add_argument("--out", type=Path, required=True, help="working directory; finished runs in it are kept")
    chosen = options.parse_args()
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    from ouroboros.accounting import cost

    scores: dict[str, dict[int, float]] = {}
    sizes = {}
    for layout in LAYOUTS:
        for name, recipe in arms(layout, chosen.steps).items():
            key = f"{layout}, {name}"
            sizes[key] = cost(recipe.model).parameters
            for seed in range(chosen.seeds):
                run = chosen.out / f"{layout}-{name.replace(' ', '')}-{seed}"
                scores.setdefault(key, {})[seed] = measure(recipe, seed, run, chosen.max_bytes)
                print(key, seed, f"{scores[key][seed]:.4f}", file=sys.stderr, flush=True)
    print(
        json.dumps(
            {
                "study": "delta",
                "steps": chosen.steps,
                "seeds": chosen.seeds,
                "parameters": sizes,
                "bits_per_byte": {key: list(found.values()) for key, found in scores.items()},
                **{f"difference_from_{base}": differences(scores, base) for base in BASES},
            }
        )
    )


def differences(scores: dict[str, dict[int, float]], base: str) -> dict[str, Any]:
    """Each arm minus the arm ``base`` of its layout, if that has one: mean over seeds with a 95 % interval."""
    from ouroboros.eval.stats import mean_interval

    made = {}
    for key, found in scores.items():
        other = scores.get(f"{key.partition(',')[0]}, {base}", found)
        if found is not other:
            made[key] = dataclasses.asdict(mean_interval([found[seed] - other[seed] for seed in found]))
    return made


def arms(layout: str, steps: int) -> dict[str, Any]:
    """The recipes of one layout, with equal numbers of parameters to within 1 %."""
    from ouroboros.config.parts.delta import DeltaSpec
    from ouroboros.recipes import recipe
    from ouroboros.recipes.twin import equal_size

    plain = recipe("gpt", "tiny")
    plain = dataclasses.replace(
        plain,
        model=dataclasses.replace(plain.model, layout=LAYOUTS[layout], vocab_size=1024),
        data=dataclasses.replace(plain.data, tokenizer="bpe:1024"),
        train=dataclasses.replace(plain.train, steps=steps, eval_every=0, checkpoint_every=0, compile="off"),
    )
    kinds = {
        "write-only": DeltaSpec(erase=False),
        "delta": DeltaSpec(),
        "delta 4": DeltaSpec(values=4, embedding_conv=True),
    }
    if layout == "plain":  # what of a gain of the last one is the erasing, and what the convolution
        kinds["write-only 4"] = DeltaSpec(values=4, embedding_conv=True, erase=False)
        kinds["delta 4 copies"] = DeltaSpec(values=4)
    made = {"additive": plain}
    for name, delta in kinds.items():
        model = plain.model.replace(residual=delta)
        made[name] = dataclasses.replace(plain, model=equal_size(model, plain.model))
    return made


def measure(recipe: Any, seed: int, run: Path, limit: int) -> float:
    """Bits per byte on the held-out files of one run; trained now unless it is there already."""
    from ouroboros.api import open_model
    from ouroboros.data.prepared import open_prepared
    from ouroboros.eval.score import score
    from ouroboros.train.run import start

    if not (run / "model.safetensors").is_file():
        shutil.rmtree(run, ignore_errors=True)
        prepared = run.parent / "data"
        if prepared.is_dir():  # every run reads the same shards
            shutil.copytree(prepared, run / "data")
        start(dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, seed=seed)), run)
        if not prepared.is_dir():
            shutil.copytree(run / "data", prepared)
    opened = open_model(run)
    model, tokenizer = opened.model, opened.tokenizer
    window = recipe.data.sequence_length
    return score(
        model, tokenizer, open_prepared(run / "data").documents("test"), window=window, max_bytes=limit
    ).bits_per_byte


if __name__ == "__main__":
    main()
