"""How fast recipes train on this machine, measured in turns so that what else the machine does meets all of them."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ouroboros.ablate.changes import fingerprint
from ouroboros.config import Recipe
from ouroboros.data.prepared import PreparedData
from ouroboros.files import read_object, write_whole
from ouroboros.train.distributed import workers
from ouroboros.train.run import new_model
from ouroboros.train.threads import using_threads
from ouroboros.train.trainer import Trainer

UNTIMED, TIMED = 2, 9
"""Steps of each recipe."""
SECONDS = 60.0
"""That measuring may take."""


def training_rates(
    recipes: Sequence[Recipe], data: PreparedData, kept: Path, *, seconds: float = SECONDS
) -> list[float]:
    """Training tokens per second of each recipe: by the median of a few steps.

    Args:
        recipes: resolved, with a number of threads and a budget.
        data: the prepared text.
        kept: a JSON file of what was measured before, by fingerprint, which is not measured again, so that what
            follows from it stays as it is when a command is repeated.
        seconds: after which the rest of the steps is left out, but for three.
    """
    known = read_object(kept) if kept.is_file() else {}
    names = [fingerprint(recipe) for recipe in recipes]
    if not known.keys() >= set(names):
        known |= dict(zip(names, _measured(recipes, data, seconds), strict=True))
        write_whole(kept, (json.dumps(known, indent=2) + "\n").encode())
    return [known[name] for name in names]


def _measured(recipes: Sequence[Recipe], data: PreparedData, most: float) -> list[float]:
    with workers() as crew, using_threads(recipes[0].train.threads or torch.get_num_threads()):
        trainers = [Trainer(recipe, new_model(recipe, data), data, crew) for recipe in recipes]
        for trainer in trainers:
            trainer.warm_up()
        seconds: list[list[float]] = [[] for _ in trainers]
        begun = time.monotonic()
        for number in range(UNTIMED + TIMED):
            for trainer, taken in zip(trainers, seconds, strict=True):
                taken.append(trainer.step().seconds)
            if number >= UNTIMED + 2 and time.monotonic() - begun > most:
                break
    return [
        trainer.step_tokens / statistics.median(taken[UNTIMED:])
        for trainer, taken in zip(trainers, seconds, strict=True)
    ]
