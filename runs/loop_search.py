"""Search: which looped model is best at an equal number of stored parameters, and is it better than any plain one?

Every arm has the same number of stored parameters (within 1 %, set by the width of its feed-forward networks), reads the
same windows in the same order, and has the same norms. Plain models of several depths are searched as well, so that the
loop is compared with the best of them. Short runs sort out; what is promising is trained longer with other seeds, and
scored on another text than the one that chose.

    python runs/loop_search.py --out work --data books_train.txt --held-out books_valid.txt --tokens 1000000

Each run is kept in OUT, and a second call trains only what is missing; ``--part 1/2`` takes every second one, so that two
processes can share the work. Prints one line of JSON. `docs/studies/loop-recipe.md` tells what came out.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

WIDTHS = {
    # layout: hidden size, so that feed-forward networks are about three times as wide
    "2": 128, "3": 112, "4": 96, "6": 80, "8": 64,
    "(1)x4": 176, "(2)x2": 128, "(2)x3": 128, "(2)x4": 128, "(2)x6": 128, "(3)x2": 112, "(3)x3": 112, "(4)x2": 96, "(4)x3": 96,
    "1 (1)x4 1": 112, "1 (2)x3 1": 96, "1 (2)x4 1": 96, "1 (1)x6 1": 112,
}  # fmt: skip
PARAMETERS = 550_000
RATES = {"": 1e-2, "half": 5e-3, "double": 2e-2, "fourth": 2.5e-3}


def main() -> None:
    """Train what is missing, score it, and list the arms."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True, help="working directory; finished runs in it are kept")
    options.add_argument("--arms", required=True, help="arms, separated by semicolons: a layout and options, such as (2)x4 add hyper")
    options.add_argument("--seeds", default="0", help="seeds, separated by commas")
    options.add_argument("--data", default="python:", help="training text")
    options.add_argument("--held-out", type=Path, help="text to score; by default the run's own held-out split")
    options.add_argument("--tokens", type=int, default=1_000_000, help="training tokens of each run")
    options.add_argument("--max-bytes", type=int, default=150_000, help="held-out bytes scored")
    options.add_argument("--part", default="1/1", help="which share of the runs this process makes")
    chosen = options.parse_args()
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    chosen.out.mkdir(parents=True, exist_ok=True)
    number, parts = map(int, chosen.part.split("/"))
    cells = list(itertools.product(map(int, chosen.seeds.split(",")), map(str.strip, chosen.arms.split(";"))))
    for seed, arm in cells[number - 1 :: parts]:
        row = measured(chosen, arm, seed)
        print(json.dumps(row), file=sys.stderr, flush=True)


def recipe_of(arm: str, data: str, tokens: int, seed: int) -> Any:
    """The recipe of an arm: its layout, and what its options change."""
    from ouroboros.config import LoopTraining, RMSNormSpec
    from ouroboros.config.parts.loop import HyperSpec, InjectionSpec, LoopEmbeddingSpec, LoopGainSpec, LoopNormSpec, RecurrenceGateSpec
    from ouroboros.config.parts.stem import EmbeddingNormSpec
    from ouroboros.recipes import recipe
    from ouroboros.recipes.twin import equal_size

    layout = next(name for name in sorted(WIDTHS, key=len, reverse=True) if (arm + " ").startswith(name + " "))
    wanted = arm[len(layout) :].split()
    made = recipe("loop", "tiny")
    block, optim, train = made.model.block, made.optim, made.train
    mixer, ffn, loop, model = block.mixer, block.ffn, [], {}
    for word in wanted:
        if word == "add":
            loop.append(InjectionSpec(mode="add"))
        elif word == "concat":
            loop.append(InjectionSpec(mode="concat"))
        elif word == "emb":
            loop.append(LoopEmbeddingSpec())
        elif word == "hyper":
            loop.append(HyperSpec())
        elif word == "norm":
            loop.append(LoopNormSpec())
        elif word == "gain":
            loop.append(LoopGainSpec(form="channel"))
        elif word == "gate":
            loop.append(RecurrenceGateSpec())
        elif word == "relu2":
            ffn = ffn.replace(kind="relu2")
        elif word == "xsa":
            mixer = mixer.replace(exclusive=True)
        elif word == "vres":
            mixer = mixer.replace(value_residual=0.5)
        elif word == "zero":
            model["zero_init_outputs"] = True
        elif word == "depth":
            model["output_init"] = "depth_scaled"
        elif word == "pre":
            block = dataclasses.replace(block, norm=RMSNormSpec())
        elif word == "late":
            most = max(int(digit) for digit in layout.split("x")[1].split()[0])
            train = dataclasses.replace(train, loops=LoopTraining(curriculum=((0.0, 1), (0.4, max(2, most - 1)), (0.65, most))))
        elif word in RATES:
            optim = dataclasses.replace(optim, lr=RATES[word], embedding_lr=2 * RATES[word])
        elif word.startswith("b"):
            train = dataclasses.replace(train, batch_size=int(word[1:]))
        else:
            sys.exit(f"unknown option {word!r} of arm {arm!r}")
    order = ("inject", "embedding", "hyper", "norm", "gate", "gain")
    loop.sort(key=lambda part: order.index(part.kind))
    block = dataclasses.replace(block, mixer=mixer, ffn=ffn)
    spec = made.model.replace(
        layout=layout, hidden_size=WIDTHS[layout], block=block, vocab_size=1024, loop=tuple(loop), stem=(EmbeddingNormSpec(),), **model
    )
    # A plain model of four blocks sets the number of parameters.
    target = recipe("gpt", "tiny").model.replace(layout="4", hidden_size=96, vocab_size=1024)
    target = target.replace(block=dataclasses.replace(target.block, ffn=target.block.ffn.replace(intermediate_size=288)))
    spec = equal_size(spec, target)
    train = dataclasses.replace(
        train, tokens=tokens, seed=seed, eval_every=0, checkpoint_every=0, telemetry_every=0, **({} if any(w[1:].isdigit() and w[0] == "b" for w in wanted) else {"batch_size": 4})
    )
    text = dataclasses.replace(made.data, sources=(data,), tokenizer="bpe:1024", sequence_length=256)
    return dataclasses.replace(made, name="arm", model=spec, optim=optim, data=text, train=train)


def measured(chosen: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """The score of one run, trained if it is not there."""
    from ouroboros.accounting import cost
    from ouroboros.api import open_model
    from ouroboros.eval.score import score
    from ouroboros.train.run import resume, start
    from ouroboros.train.rundir import RunDirectory

    name = arm.replace(" ", "_").replace("(", "").replace(")", "") + f"-{chosen.tokens}-{seed}"
    row_file = chosen.out / f"{name}.json"
    if row_file.is_file():
        return json.loads(row_file.read_text())
    run = RunDirectory(chosen.out / name)
    if not run.weights_file.is_file():
        if run.is_run:
            resume(run.path)
        else:
            start(recipe_of(arm, chosen.data, chosen.tokens, seed), run.path)
    opened = open_model(run.path)
    test = [chosen.held_out.read_bytes()] if chosen.held_out else run.open_data().documents("valid")
    found = score(opened.model, opened.tokenizer, test, window=256, max_bytes=chosen.max_bytes)
    found_cost = cost(opened.spec, context=128)
    state = run.state()["counters"]
    row = {"arm": arm, "seed": seed, "tokens": chosen.tokens, "bits_per_byte": found.bits_per_byte, "seconds": state["seconds"],
           "parameters": found_cost.parameters, "flops": found_cost.training_flops_per_token}
    row_file.write_text(json.dumps(row))
    return row


if __name__ == "__main__":
    main()
