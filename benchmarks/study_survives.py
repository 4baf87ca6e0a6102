"""A study of many short cells is killed at random moments, and its disk fills up: is anything lost, or run twice?

20 arms with 3 seeds each are trained in a study of their own, and once more in one whose process gets SIGKILL at random
moments, and which finds its disk full at others; it is started again after each. Where that is allowed (root on Linux)
the disk is a small file system in memory that is filled up; elsewhere, and with ``--quick``, a call that brings a file
to the disk fails as on a full one, and ``disk`` says so. A checkpoint is written after each step, so that a step may be
taken again only where its checkpoint was not complete: at most one step for each death.

The line of JSON says how often the study died, how many cells were there in the end, whether their scores are to the
last bit those of the undisturbed study (``same``), how many cells with a result were touched again (``cells_again``),
and how many steps were taken twice (``steps_again``).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import load, parser, progress, report, set_threads

JOURNAL = "journal"
FULL = 3
"""Status of a life that ended because the disk was full."""
ROOM = 200
"""MB of the file system in memory."""


def main() -> None:
    """Run the study alone, then with deaths."""
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=25, help="of each cell")
    options.add_argument("--deaths", type=int, default=12, help="how often it is disturbed")
    options.add_argument("--seed", type=int, default=0, help="of the moments")
    chosen = options.parse_args()
    started = load()
    set_threads(chosen.threads or 1)
    arms, seeds, steps, deaths = (3, 1, 3, 4) if chosen.quick else (20, 3, chosen.steps, chosen.deaths)
    with tempfile.TemporaryDirectory() as place, _disk(Path(place) / "disk", not chosen.quick) as real:
        here = Path(place) / "disk"
        study = _study(Path(place), arms, seeds, steps)
        _warm_up(study)
        begun = time.monotonic()
        assert _ended(_life(study, here / "whole", Path(place) / "whole.journal"), None) == 0
        alone = time.monotonic() - begun
        progress(f"undisturbed: {alone:.1f} s")
        lives = _disturbed(study, here, alone, deaths, random.Random(chosen.seed), real)
        whole, killed = (_results(here / name) for name in ("whole", "killed"))
        taken = (Path(place) / JOURNAL).read_text().splitlines()
    steps_taken = [line for line in taken if line.startswith("step ")]
    report(
        "study_survives",
        started,
        cells=len(killed),
        asked=arms * seeds,
        lives=lives,
        disk="filled" if real else "simulated",
        same=whole == killed,
        cells_again=sum(line.startswith("again ") for line in taken),
        steps=len(set(steps_taken)),
        steps_asked=arms * seeds * steps,
        steps_again=len(steps_taken) - len(set(steps_taken)),
        seconds_alone=round(alone, 1),
    )


def _study(place: Path, arms: int, seeds: int, steps: int) -> Any:
    """Arms that differ in their learning rate, on a small text."""
    from ouroboros.ablate.changes import changed
    from ouroboros.ablate.study import Arm, Stage, Study
    from ouroboros.recipes import recipe

    text = place / "text.txt"
    text.write_text("".join(f"{n} times {n % 13} is {n * (n % 13)}, more or less\n" for n in range(3000)))
    fixed = {"precision": "fp32", "compile": "off", "eval_every": 0, "batch_size": 4, "checkpoint_every": 1}
    changes = {f"train.{name}": value for name, value in fixed.items()}
    changes |= {"model.hidden_size": 16, "model.block.ffn.intermediate_size": 24, "optim.muon_precision": "fp32"}
    changes |= {"data.sources": [str(text)], "data.sequence_length": 64}
    control = Arm(name="control", recipe=changed(recipe("loop", "tiny"), changes))
    return Study(
        name="survives",
        question="Does a study survive?",
        control=control,
        arms=tuple(Arm.changing(control, f"rate-{n}", {"optim.lr": 0.01 + n / 1000}) for n in range(1, arms)),
        seeds=tuple(range(1, seeds + 1)),
        stages=(Stage(name="only", steps=steps),),
        score_bytes=2048,
    )


def _warm_up(study: Any) -> None:
    """Import and measure once what every life would otherwise begin with; lives are forked from here."""
    import logging

    from transformers.utils import logging as theirs

    from ouroboros.ablate import runner

    logging.disable(logging.CRITICAL)
    theirs.disable_progress_bar()
    runner.code_version()
    with tempfile.TemporaryDirectory() as place:
        _run(study, Path(place) / "out", Path(place) / "journal", steps=1)
    runner.dead_arms = lambda *_: {}  # the proof of life is not in question, and takes longer than the cells


def _run(study: Any, out: Path, journal: Path, steps: int | None = None) -> None:
    """A life of the study; each step, and each cell that is begun although it has a result, is noted before it is."""
    import dataclasses

    from ouroboros.ablate import cells, runner
    from ouroboros.train.trainer import Trainer

    if steps is not None:
        stage = dataclasses.replace(study.stages[0], steps=steps)
        runner.run_study(dataclasses.replace(study, arms=study.arms[:1], seeds=(1,), stages=(stage,)), out)
        return
    step, train = Trainer.step, cells._train

    def note(line: str) -> None:
        # Not in the file system that fills up: what is noted has to be noted.
        with journal.open("a") as file:
            file.write(f"{line}\n")

    def noted_step(self: Any, **options: Any) -> Any:
        note(f"step {self.recipe.optim.lr} {self.recipe.train.seed} {self.counters.step}")
        return step(self, **options)

    def noted_train(cell: Any) -> None:
        if (cell.path / cells.RESULT).exists():
            note(f"again {cell.run}")
        train(cell)

    Trainer.step, cells._train = noted_step, noted_train
    runner.run_study(study, out)


def _life(study: Any, out: Path, journal: Path, full_after: float | None = None) -> int:
    """Start a life in a child; its process. ``full_after`` seconds the disk is full where it cannot be filled."""
    child = os.fork()
    if child:
        return child
    from ouroboros import files
    from ouroboros.errors import OuroborosError

    if full_after is not None:
        flush, end = files.flush, time.monotonic() + full_after

        def full(path: Path) -> None:
            if time.monotonic() > end:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            flush(path)

        files.flush = full
    try:
        _run(study, out, journal)
        status = 0
    except OuroborosError as error:
        sys.stderr.write(f"{error}\n")
        status = FULL if os.strerror(errno.ENOSPC) in str(error) else 1
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        status = 1
    os._exit(status)


def _ended(child: int, timer: threading.Timer | None) -> int:
    """The status of a life: 0, an error's, or minus the signal's number."""
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    if timer is not None:  # before the number of the process can be another's
        timer.cancel()
        timer.join()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _disturbed(study: Any, here: Path, alone: float, deaths: int, chance: random.Random, real: bool) -> dict[str, int]:
    """Run the study with ``deaths`` disturbances, every third of them a full disk; how its lives ended."""
    lives = {"killed": 0, "disk full": 0, "untroubled": 0}
    out, journal = here / "killed", here.parent / JOURNAL
    for number in range(deaths + 1):
        disturbed, fills = number < deaths, number % 3 == 2
        after = chance.uniform(0.2, 1.8) * alone / (deaths + 1)
        child = _life(study, out, journal, after if disturbed and fills and not real else None)
        timer = None
        if disturbed and not fills:
            timer = threading.Timer(after, os.kill, (child, signal.SIGKILL))
        elif disturbed and real:
            timer = threading.Timer(after, _fill, (here / "ballast",))
        if timer is not None:
            timer.start()
        status = _ended(child, timer)
        (here / "ballast").unlink(missing_ok=True)
        assert status in (0, FULL, -signal.SIGKILL), status
        lives[{0: "untroubled", FULL: "disk full"}.get(status, "killed")] += 1
        progress(f"life {number + 1} of {deaths + 1}: {status}, {len(_results(out))} results")
    return lives


def _fill(path: Path) -> None:
    """Write until nothing more fits."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@contextlib.contextmanager
def _disk(place: Path, wanted: bool) -> Iterator[bool]:
    """A small file system at ``place``, where that is allowed, or a directory; whether it is the former."""
    place.mkdir()
    real = False
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}m", "tmpfs", str(place)]
    with contextlib.suppress(FileNotFoundError):
        real = wanted and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield real
    finally:
        if real:
            subprocess.run(["umount", "-l", str(place)], check=True)


def _results(out: Path) -> dict[str, Any]:
    """Scores by cell, to the last bit."""
    found = {}
    for path in sorted(out.glob("*/*/seed-*/result.json")):
        values = json.loads(path.read_text())
        found[str(path.relative_to(out))] = [values["score"]["unit_nats"], values["steps"]]
    return found


if __name__ == "__main__":
    main()
