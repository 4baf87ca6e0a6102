"""What the runner of studies costs: a study of two arms against the same two trainings and scores written by hand.

Both prepare the text once, train the same recipes with the same seed and score the same held-out text, in turns in one
process, and processor time counts, so that other programs disturb little. ``ratio`` is the time of the study over that
of the bare loop, round by round; ``seconds_per_cell`` is the difference, which does not depend on how long a run is,
and ``share_of_a_minute`` what it is of a run of 60 seconds. The proof that every arm is alive comes once for each study
and is timed by itself.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import alternate, computed, load, parser, progress, ratio, report, set_threads, spread


def main() -> None:
    """Run the comparison."""
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=600, help="of each run")
    chosen = options.parse_args()
    started = load()
    set_threads(chosen.threads)
    steps, rounds = (2, 1) if chosen.quick else (chosen.steps, chosen.rounds or 5)
    with tempfile.TemporaryDirectory() as place:
        study = _study(Path(place), steps)
        alive: list[float] = []
        arms: dict[str, Callable[[], float]] = {
            "study": lambda: computed(lambda: _study_run(study, Path(place) / "study", alive)) - alive[-1],
            "bare": lambda: computed(lambda: _bare_run(study, Path(place) / "bare")),
        }
        for name, arm in arms.items():
            progress(f"first turn of {name}: {arm():.1f} s")
        found = alternate(arms, rounds)
    cells = 2
    extra = spread([(a - b) / cells for a, b in zip(found["study"], found["bare"], strict=True)])
    report(
        "ablate_overhead",
        started,
        steps=steps,
        cells=cells,
        clock="processor time",
        seconds={name: spread(values) for name, values in found.items()},
        ratio=ratio(found["study"], found["bare"]),
        seconds_per_cell=extra,
        share_of_a_minute=extra["median"] / 60,
        proof_of_life_seconds=spread(alive),
    )


def _study(place: Path, steps: int) -> Any:
    """Two arms on a text of 200 kB."""
    from ouroboros.ablate.changes import changed
    from ouroboros.ablate.study import Arm, Stage, Study
    from ouroboros.recipes import recipe

    text = place / "text.txt"
    text.write_text("".join(f"{n} times {n % 13} is {n * (n % 13)}, more or less\n" for n in range(6000)))
    fixed = {"precision": "fp32", "compile": "off", "eval_every": 0, "batch_size": 8}
    changes = {f"train.{name}": value for name, value in fixed.items()}
    changes |= {"data.sources": [str(text)], "data.sequence_length": 128, "optim.muon_precision": "fp32"}
    control = Arm(name="control", recipe=changed(recipe("loop", "tiny"), changes))
    return Study(
        name="overhead",
        question="What does the runner cost?",
        control=control,
        arms=(Arm.changing(control, "rate", {"optim.lr": 0.02}),),
        seeds=(1,),
        stages=(Stage(name="only", steps=steps),),
    )


def _study_run(study: Any, out: Path, alive: list[float]) -> None:
    """The study in a new directory; the seconds of its proof of life are added to ``alive``."""
    from ouroboros.ablate import runner

    shutil.rmtree(out, ignore_errors=True)
    original, seconds = runner.dead_arms, [0.0]

    def judged(*arguments: Any) -> Any:
        found: list[Any] = []
        seconds[0] = computed(lambda: found.append(original(*arguments)))
        return found[0]

    runner.dead_arms = judged
    try:
        runner.run_study(study, out)
    finally:
        runner.dead_arms = original
        alive.append(seconds[0])


def _bare_run(study: Any, out: Path) -> None:
    """Prepare, train and score, as a script would."""
    import torch

    from ouroboros.api import open_model
    from ouroboros.data.shards import prepare
    from ouroboros.eval.score import score
    from ouroboros.train.run import start

    shutil.rmtree(out, ignore_errors=True)
    data = prepare(study.control.recipe.data, out / "data")
    for arm in study.every_arm:
        recipe = study.stages[0].recipe(arm.recipe, study.seeds[0])
        shutil.copytree(out / "data", out / arm.name / "data")
        start(recipe, out / arm.name)
        opened, window = open_model(out / arm.name), recipe.data.sequence_length
        with torch.no_grad():
            score(opened.model, data.tokenizer, data.documents("test"), window=window, stride=window // 2)


if __name__ == "__main__":
    main()
