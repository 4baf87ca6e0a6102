"""Search: which looped model is best at an equal number of stored parameters, and is it better than any plain one?

Every arm has the same number of stored parameters (within 1 %, set by the width of its feed-forward networks), reads
the same windows in the same order, and has the same norms. Plain models of several depths are searched as well, so that
the loop is compared with the best of them. Short runs sort out; what is promising is trained longer with other seeds,
and scored on another text than the one that chose.

    python runs/loop_search.py --out work --arms "4;(2)x4 add;(2)x4 add hyper" --tokens 500000 \
        --data books_train.txt --held-out books_valid.txt

An arm is a layout and what is changed of it, see WIDTHS and CHANGES. Each run is kept in OUT, and a second call trains
only what is missing; ``--part 1/2`` takes every second one, so that two processes can share the work. Prints one line
of JSON with every score, and each arm's difference from the first one, paired by seed. `docs/studies/loop-recipe.md`
tells what came out.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WIDTHS = {"2": 128, "3": 112, "4": 96, "6": 80, "8": 64}
WIDTHS |= {"(1)x4": 176, "(2)x2": 128, "(2)x3": 128, "(2)x4": 128, "(2)x6": 128}
WIDTHS |= {"(3)x2": 112, "(3)x3": 112, "(4)x2": 96, "(4)x3": 96}
WIDTHS |= {"1 (1)x4 1": 112, "1 (1)x6 1": 112, "1 (2)x3 1": 96, "1 (2)x4 1": 96, "2 (2)x2 2": 80}
"""Hidden size by layout, so that feed-forward networks of all are about three times as wide."""


def main() -> None:
    """Train what is missing, score it, and list the arms."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True, help="working directory; finished runs in it are kept")
    options.add_argument("--arms", required=True, help="arms, separated by semicolons")
    options.add_argument("--seeds", default="0", help="seeds, separated by commas")
    options.add_argument("--data", default="python:", help="training text")
    options.add_argument("--held-out", type=Path, help="text to score; by default the run's own validation split")
    options.add_argument("--tokens", type=int, default=1_000_000, help="training tokens of each run")
    options.add_argument("--max-bytes", type=int, default=150_000, help="held-out bytes scored")
    options.add_argument("--scale", type=float, default=1.0, help="width of all models as a share of WIDTHS")
    options.add_argument("--tokenizer", default="bpe:1024", help="bytes, or bpe: and a size of the vocabulary")
    options.add_argument("--batch", type=int, default=4, help="windows of 256 tokens in each step")
    options.add_argument("--part", default="1/1", help="which share of the runs this process makes")
    chosen = options.parse_args()
    prepare(chosen.out)
    number, parts = map(int, chosen.part.split("/"))
    arms = [arm.strip() for arm in chosen.arms.split(";")]
    cells = list(itertools.product(map(int, chosen.seeds.split(",")), arms))
    rows = []
    for seed, arm in cells[number - 1 :: parts]:
        rows.append(measured(chosen, arm, seed))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(json.dumps({"study": "loop_search", "tokens": chosen.tokens, "arms": summary(rows, arms)}))


def prepare(out: Path, threads: int = 1) -> None:
    """Make the working directory and set the number of threads; what is loaded is not reported."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)


def summary(rows: Sequence[dict[str, Any]], arms: Sequence[str]) -> list[dict[str, Any]]:
    """Each arm's scores, and its difference from the first arm with a Student interval over seeds."""
    from ouroboros.eval.stats import mean_interval

    scores = {arm: {row["seed"]: row["bits_per_byte"] for row in rows if row["arm"] == arm} for arm in arms}
    found = []
    for arm in arms:
        both = sorted(scores[arm].keys() & scores[arms[0]].keys())
        apart = mean_interval([scores[arm][seed] - scores[arms[0]][seed] for seed in both]).to_dict() if both else None
        found.append({"arm": arm, "bits_per_byte": scores[arm], "difference": apart})
    return found


def _changes() -> dict[str, Callable[[Any], Any]]:
    """What a word behind a layout does to a recipe."""
    from ouroboros.config import LoopTraining, RMSNormSpec
    from ouroboros.config.parts import loop

    def part(made: Callable[[], Any]) -> Callable[[Any], Any]:
        return lambda recipe: _model(recipe, loop=(*recipe.model.loop, made()))

    def mixer(**values: Any) -> Callable[[Any], Any]:
        return lambda recipe: _model(recipe, mixer=recipe.model.block.mixer.replace(**values))

    def ffn(**values: Any) -> Callable[[Any], Any]:
        return lambda recipe: _model(recipe, ffn=recipe.model.block.ffn.replace(**values))

    def model(**values: Any) -> Callable[[Any], Any]:
        return lambda recipe: _model(recipe, **values)

    def rate(lr: float) -> Callable[[Any], Any]:
        return lambda recipe: dataclasses.replace(
            recipe, optim=dataclasses.replace(recipe.optim, lr=lr, embedding_lr=2 * lr)
        )

    def late(recipe: Any) -> Any:
        most = recipe.model.schedule.loops
        steps = ((0.0, 1), (0.4, max(2, most - 1)), (0.65, most))
        return dataclasses.replace(
            recipe, train=dataclasses.replace(recipe.train, loops=LoopTraining(curriculum=steps))
        )

    return {
        "add": part(lambda: loop.InjectionSpec(mode="add")),
        "concat": part(lambda: loop.InjectionSpec(mode="concat")),
        "emb": part(loop.LoopEmbeddingSpec),
        "hyper": part(loop.HyperSpec),
        "norm": part(loop.LoopNormSpec),
        "gate": part(loop.RecurrenceGateSpec),
        "gain": part(lambda: loop.LoopGainSpec(form="channel")),
        "relu2": ffn(kind="relu2"),
        "xsa": mixer(exclusive=True),
        "vres": mixer(value_residual=0.5),
        "zero": model(zero_init_outputs=True),
        "depth": model(output_init="depth_scaled"),
        "pre": model(norm=RMSNormSpec()),
        "late": late,
        "double": rate(2e-2),
        "half": rate(5e-3),
        "fourth": rate(2.5e-3),
    }


def _model(recipe: Any, **values: Any) -> Any:
    return dataclasses.replace(recipe, model=recipe.model.replace(**values))


def recipe_of(
    arm: str, data: str, tokens: int, seed: int, scale: float = 1.0, batch: int = 4, tokenizer: str = "bpe:1024"
) -> Any:
    """The recipe of an arm: its layout, what its options change, and its width as a share of :data:`WIDTHS`."""
    from ouroboros.recipes import recipe
    from ouroboros.recipes.twin import equal_size

    layout = next(name for name in sorted(WIDTHS, key=len, reverse=True) if f"{arm} ".startswith(f"{name} "))
    changes = _changes()
    width, vocabulary = _width(WIDTHS[layout], scale), int(tokenizer.removeprefix("bpe:").replace("bytes", "256"))
    made = _model(recipe("loop", "tiny"), layout=layout, hidden_size=width, vocab_size=vocabulary, loop=())
    for word in arm[len(layout) :].split():
        if word not in changes:
            sys.exit(f"unknown option {word!r} of arm {arm!r}; there are {', '.join(changes)}")
        made = changes[word](made)
    # A plain model of four blocks sets the number of parameters.
    target = recipe("gpt", "tiny").model
    width = _width(WIDTHS["4"], scale)
    target = target.replace(
        layout="4", hidden_size=width, vocab_size=vocabulary, ffn=target.block.ffn.replace(intermediate_size=3 * width)
    )
    made = dataclasses.replace(made, name="arm", model=equal_size(made.model, target))
    off = {"eval_every": 0, "checkpoint_every": 0, "telemetry_every": 0}
    train = dataclasses.replace(made.train, tokens=tokens, seed=seed, batch_size=batch, **off)
    text = dataclasses.replace(made.data, sources=(data,), tokenizer=tokenizer, sequence_length=256)
    return dataclasses.replace(made, data=text, train=train)


def _width(width: int, scale: float) -> int:
    return 8 * round(width * scale / 8)


def trained(recipe: Any, path: Path) -> Any:
    """The model in a run directory, trained if it is not there, and trained on if that was interrupted."""
    from ouroboros.api import open_model
    from ouroboros.train.run import resume, start
    from ouroboros.train.rundir import RunDirectory

    run = RunDirectory(path)
    if not run.weights_file.is_file() and not (resume(path) if run.is_run else start(recipe, path)).finished:
        sys.exit(f"{path}: training was stopped; the same command goes on")
    return open_model(path)


def measured(chosen: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """The score of one run, trained if it is not there."""
    from ouroboros.accounting import cost
    from ouroboros.eval.score import score
    from ouroboros.files import write_whole

    name = arm.translate(str.maketrans(" ", "_", "()")) + f"-{chosen.tokens}-{seed}"
    name += "" if chosen.scale == 1 else f"-{chosen.scale:g}"
    name += "" if chosen.batch == 4 else f"-{chosen.batch}"
    name += "" if chosen.tokenizer == "bpe:1024" else f"-{chosen.tokenizer.replace(':', '')}"
    row_file = chosen.out / f"{name}.json"
    if row_file.is_file():
        return json.loads(row_file.read_bytes())
    made = recipe_of(arm, chosen.data, chosen.tokens, seed, chosen.scale, chosen.batch, chosen.tokenizer)
    opened = trained(made, chosen.out / name)
    run = opened.run
    test = [chosen.held_out.read_bytes()] if chosen.held_out else run.open_data().documents("valid")
    found = score(opened.model, opened.tokenizer, test, window=256, max_bytes=chosen.max_bytes)
    counted = cost(opened.spec, context=128)
    row = {"arm": arm, "seed": seed, "tokens": chosen.tokens, "bits_per_byte": found.bits_per_byte}
    row |= {"seconds": run.state()["counters"]["seconds"], "parameters": counted.parameters}
    row |= {"training_flops_per_token": counted.training_flops_per_token}
    write_whole(row_file, json.dumps(row).encode())
    return row


if __name__ == "__main__":
    main()
