"""A run that is killed by SIGKILL, again and again, ends with the weights of a run that was left alone.

One process imports everything, then forks a child for each life of the run: forking is a thousand times faster than
starting Python and torch anew.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ouroboros

DRIVER = r'''
import contextlib, dataclasses, hashlib, json, logging, os, random, signal, sys, time
from pathlib import Path

import torch

from ouroboros.config import Recipe, from_json
from ouroboros import files
from ouroboros.train import checkpoint, session
from ouroboros.train.precision import matmul_peak
from ouroboros.train.run import resume, start
import transformers.utils.logging as hf_logging

torch.set_num_threads(1)
logging.disable(logging.CRITICAL)
hf_logging.disable_progress_bar()
matmul_peak("cpu", torch.float32)  # measured once; children inherit it
recipe = from_json(Recipe, Path(sys.argv[1]).read_text())
here = Path(sys.argv[2])
every, KILLS = recipe.train.checkpoint_every, 20


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner, name, number, after):
    """Have the process kill itself at the given call of a function, before or after its work."""
    original, calls = getattr(owner, name), iter(range(10**9))

    def counting(*arguments, **keywords):
        hit = next(calls) == number
        if hit and not after:
            die()
        value = original(*arguments, **keywords)
        if hit:
            die()
        return value

    setattr(owner, name, counting)


def wait_after(run: Path, step: int) -> None:
    """Have the process wait to be killed once the checkpoint of ``step`` is there."""
    original = session.retain

    def waiting(*arguments, **keywords):
        original(*arguments, **keywords)
        if newest(run) >= step:
            signal.pause()

    session.retain = waiting


def live(run: Path, recipe: Recipe, *sabotage, until: int | None = None) -> int:
    """Fork a child that goes on with the run to its end, or waits after a step; returns its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        if sabotage:
            at_call(*sabotage)
        if until is not None:
            wait_after(run, until)
        if not (run / "model.safetensors").exists():
            resume(run) if (run / "recipe.json").exists() else start(recipe, run)
        status = 0
    except BaseException as error:
        (here / "failure.txt").write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(status)


def end(child: int) -> int:
    """Wait for a child; its status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def sha(run: Path) -> str:
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def newest(run: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    return max((int(p.name[5:]) for p in (run / "checkpoints").glob("step-*")), default=0)


# At random instants. The run must not end before its last kill: each life may save once more than the one before.
begun = time.monotonic()
assert end(live(here / "whole", recipe)) == 0, (here / "failure.txt").read_text()
length = time.monotonic() - begun
chooser = random.Random(7)
run, kills, torn = here / "killed", 0, 0
while True:
    last = (kills + 1) * every
    child = live(run, recipe, until=last if kills < KILLS else None)
    if kills < KILLS:
        deadline = time.monotonic() + chooser.uniform(0.0, 0.25 * length)
        while time.monotonic() < deadline and newest(run) < last:
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    status = end(child)
    if status != -signal.SIGKILL:
        break
    kills += 1
    torn += any((run / "checkpoints").glob(".step-*"))
assert status == 0, (here / "failure.txt").read_text()

# At chosen places: inside a save, around its renaming, before old ones are removed, around and inside the export.
short = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=3 * every))
assert end(live(here / "short", short)) == 0, (here / "failure.txt").read_text()
places = [
    (files, "flush", 0, False),
    (files, "flush", 5, False),
    (files, "flush", 20, False),
    (checkpoint, "_write_tensors", 1, False),
    (files, "_take_place", 0, True),
    (files, "_take_place", 1, True),
    (session, "retain", 2, False),
    (session, "export", 0, False),
    (Path, "replace", 3, True),
]
aimed = {}
for index, place in enumerate(places):
    one = here / f"aimed{index}"
    first = end(live(one, short, *place))
    assert end(live(one, short)) == 0, (place[1:], (here / "failure.txt").read_text())
    aimed[f"{place[1]} {place[2]}"] = [first, sha(one), names(one)]
print(json.dumps({"kills": kills, "torn": torn, "whole": sha(here / "whole"), "killed": sha(run), "aimed": aimed,
                  "left": names(run), "short": sha(here / "short"), "files": names(here / "whole")}))
'''


@pytest.mark.timeout(300)
def test_a_run_killed_twenty_times_ends_with_the_weights_of_one_left_alone(everything, tmp_path):
    from ouroboros.config import to_json

    recipe = everything(**{"train.steps": 48, "train.checkpoint_every": 2, "train.eval_every": 10})
    (tmp_path / "recipe.json").write_text(to_json(recipe))
    (tmp_path / "runs").mkdir()
    source = str(Path(ouroboros.__file__).parent.parent)
    finished = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path / "recipe.json"), str(tmp_path / "runs")],
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = json.loads(finished.stdout)
    assert found["kills"] == 20
    assert found["killed"] == found["whole"]
    assert found["left"] == found["files"]  # nothing half-written stays
    for place, (first, sha, files) in found["aimed"].items():
        assert first == -9, place
        assert sha == found["short"], place
        assert files == found["files"], place
