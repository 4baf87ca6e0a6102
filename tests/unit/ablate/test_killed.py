"""A study that is killed by SIGKILL, again and again, ends with the results of one that was left alone, and no cell is
run twice. One process imports everything, then forks a child for each life of the study."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ouroboros
from ouroboros.config import to_json

DRIVER = r"""
import json, logging, os, signal, sys
from pathlib import Path

import torch
import transformers.utils.logging as hf_logging

from ouroboros import files
from ouroboros.ablate import cells, record, runner
from ouroboros.ablate.study import Study
from ouroboros.config import from_json
from ouroboros.train import checkpoint, session
from ouroboros.train.precision import matmul_peak
from ouroboros.train.trainer import Trainer

torch.set_num_threads(1)
logging.disable(logging.CRITICAL)
hf_logging.disable_progress_bar()
matmul_peak("cpu", torch.float32)  # measured once; children inherit it
record.code_version()
runner.dead_arms = lambda *_: {}
study = from_json(Study, Path(sys.argv[1]).read_text())
here = Path(sys.argv[2])
journal = here / "journal"


def noting(owner, name, what):
    original = getattr(owner, name)

    def noted(*arguments, **keywords):
        with journal.open("a") as file:
            file.write(what(*arguments) + "\n")
        return original(*arguments, **keywords)

    setattr(owner, name, noted)


noting(Trainer, "step", lambda t: f"{t.recipe.optim.lr} {t.recipe.train.seed} {t.counters.step}")


def live(out, kill_at=None):
    child = os.fork()
    if not child:
        places = [(files, "flush"), (checkpoint, "save"), (session, "export"), (cells, "_place"), (cells, "_measure")]
        left = [0 if kill_at is None else kill_at]

        def counting(original):
            def call(*arguments, **keywords):
                left[0] -= 1
                if kill_at is not None and left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **keywords)

            return call

        for owner, name in places:
            setattr(owner, name, counting(getattr(owner, name)))
        runner.run_study(study, out)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status)


def results(out):
    found = {}
    for path in sorted(out.glob("*/*/seed-*/result.json")):
        values = json.loads(path.read_text())
        found[str(path.relative_to(out))] = [values["score"]["unit_nats"], values["steps"]]
    return found


assert live(here / "whole") == 0
steps = sorted(journal.read_text().split("\n"))
journal.unlink()
deaths = 0
for number in range(200):
    status = live(here / "killed", 8 + 23 * number % 60)
    if status == 0:
        break
    assert status == -signal.SIGKILL, status
    deaths += 1
killed = sorted(journal.read_text().split("\n"))
again = len(killed) - len(set(killed))
same = results(here / "whole") == results(here / "killed")
print(json.dumps({"deaths": deaths, "same": same, "all": set(killed) == set(steps), "again": again}))
"""


def test_nothing_is_lost_and_nothing_is_run_twice(study_of, tmp_path):
    changes = {f"lr-{number}": {"optim.lr": 0.01 + number / 1000} for number in range(1, 3)}
    study = study_of(changes, seeds=(1,))
    told = to_json(study).replace('"checkpoint_every": 500', '"checkpoint_every": 1')
    assert told.count('"checkpoint_every": 1,') == 3
    (tmp_path / "study.json").write_text(told)
    environment = {**os.environ, "PYTHONPATH": str(Path(ouroboros.__file__).parents[1])}
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "study.json"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["same"] and found["all"] and found["deaths"] >= 3, found
    # A step is taken again only where its checkpoint was not written yet, so at most once for each death.
    assert found["again"] <= found["deaths"], found
