"""The stability guard: what it costs, how often it is wrong, and how soon it sees a rate that is far too high.

Cost: processor time of training steps with ``train.guard.action warn`` and ``off``, which take turns; unlike wall-clock
time it does not count what other programs do meanwhile. Alarms: runs of every
looped recipe with usual settings, in which there should be none. Detection: the same runs with a hundred times the
learning rate from the middle on, or with a weight of a loop that is no number.
"""

from __future__ import annotations

import dataclasses
import math
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import alternate, load, parser, progress, ratio, report, set_threads

if TYPE_CHECKING:
    from ouroboros.data.prepared import PreparedData
    from ouroboros.train.trainer import Trainer

WITHIN = 10
"""Steps in which a failure has to be seen."""


def main() -> None:
    """Run all three."""
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=3, help="healthy runs of every recipe")
    options.add_argument("--steps", type=int, default=100, help="of a healthy run")
    options.add_argument("--size", default="small", help="of the recipe whose steps are timed")
    chosen = options.parse_args()
    started = load()
    set_threads(chosen.threads)
    import logging

    from ouroboros.recipes import RECIPES, recipe

    logging.getLogger("ouroboros").setLevel(logging.ERROR)
    looped = [name for name in sorted(RECIPES) if recipe(name, "tiny").model.schedule.is_looped]
    if chosen.quick:
        looped, chosen.seeds, chosen.steps, chosen.size = looped[-1:], 1, 12, "tiny"
    with tempfile.TemporaryDirectory() as directory:
        data = _data(Path(directory))
        cost = _cost(data, chosen.size, chosen.rounds or (2 if chosen.quick else 40))
        healthy, seen = {}, {}
        for name in looped:
            runs = [_alarms(_trainer(data, name, seed, chosen.steps), chosen.steps) for seed in range(chosen.seeds)]
            healthy[name] = [alarm for run in runs for alarm in run]
            seen[name] = {failure.__name__: _seen(data, name, failure) for failure in (rate_times_100, not_a_number)}
            progress(f"{name}: alarms {healthy[name]}, seen {seen[name]}")
    report(
        "guard",
        started,
        model=f"loop, {chosen.size}",
        processor_time_warn_to_off=cost,
        healthy_runs=len(looped) * chosen.seeds,
        steps_of_a_healthy_run=chosen.steps,
        alarms={name: found for name, found in healthy.items() if found},
        seen=seen,
    )


def rate_times_100(trainer: Trainer) -> None:
    """A hundred times the learning rate."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] *= 100


def not_a_number(trainer: Trainer) -> None:
    """One weight of the first looped block."""
    schedule = trainer.model.schedule
    block = next(segment for segment in schedule.segments if segment.looped).first_block
    next(trainer.blocks[block].parameters()).data.view(-1)[0] = math.nan


def _data(directory: Path) -> PreparedData:
    """A text of made-up words, as bytes."""
    from ouroboros.config import DataSpec
    from ouroboros.data.shards import prepare

    draw = random.Random(0)
    words = ["".join(draw.choice("abcdefgh") for _ in range(draw.randint(2, 7))) for _ in range(300)]
    text = "".join(" ".join(draw.choice(words) for _ in range(8)) + "\n" for _ in range(5000))
    (directory / "text.txt").write_text(text)
    return prepare(DataSpec(sources=(str(directory / "text.txt"),), sequence_length=128), directory / "data")


def _trainer(data: PreparedData, name: str, seed: int, steps: int, size: str = "tiny", **train: Any) -> Trainer:
    """A trainer of the recipe with a small batch; narrow at size tiny."""
    import torch

    from ouroboros.eval.switches import narrow
    from ouroboros.model.configuration import OuroborosConfig
    from ouroboros.model.modeling import OuroborosForCausalLM
    from ouroboros.recipes import recipe
    from ouroboros.train.distributed import Workers
    from ouroboros.train.run import resolve
    from ouroboros.train.trainer import Trainer

    made = recipe(name, size)
    kept = {"steps": steps, "tokens": None, "minutes": None, "batch_size": 4, "accumulation": 1, "seed": seed}
    kept |= {"precision": "fp32", "compile": "off", "threads": torch.get_num_threads(), **train}
    muon = {"muon_precision": "fp32"} if made.optim.matrix_optimizer == "muon" else {}
    made = dataclasses.replace(
        made,
        data=data.spec,
        model=narrow(made.model) if size == "tiny" else made.model,
        optim=dataclasses.replace(made.optim, decay_steps=None, **muon),
        train=dataclasses.replace(made.train, **kept),
    )
    made = resolve(made, data)
    torch.manual_seed(seed)
    return Trainer(made, OuroborosForCausalLM(OuroborosConfig.from_spec(made.model)), data, Workers())


def _cost(data: PreparedData, size: str, rounds: int) -> dict[str, float]:
    """Processor time of a step with the guard and without it, round by round."""
    from ouroboros.config import GuardedTraining

    def arm(action: Any) -> Callable[[], float]:
        trainer = _trainer(data, "loop", 0, 10_000, size, guard=GuardedTraining(action=action))
        trainer.step()

        def step() -> float:
            begun = time.process_time()
            trainer.step()
            return time.process_time() - begun

        return step

    times = alternate({action: arm(action) for action in ("warn", "off")}, rounds)
    return ratio(times["warn"], times["off"])


def _alarms(trainer: Trainer, steps: int) -> list[str]:
    """The messages of a run."""
    results = [trainer.step() for _ in range(steps)]
    return [result.alarm.message for result in results if result.alarm is not None and result.alarm.new]


def _seen(data: PreparedData, name: str, fail: Any) -> dict[str, Any] | None:
    """After how many steps a failure is seen, and where; None if it is not in time."""
    trainer = _trainer(data, name, 0, 60)
    for _ in range(12):
        trainer.step()
    fail(trainer)
    for steps in range(1, WITHIN):
        alarm = trainer.step().alarm
        if alarm is not None:
            return {"steps": steps, "place": alarm.place, "quantity": alarm.quantity}
    return None


if __name__ == "__main__":
    main()
