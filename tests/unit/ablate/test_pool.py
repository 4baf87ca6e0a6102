"""Cells in several processes give what they give in one."""

import dataclasses
import os
import signal

import pytest

from ouroboros.ablate import pool
from ouroboros.ablate.cells import Stopped
from ouroboros.ablate.runner import run_study
from ouroboros.ablate.study import Stage
from ouroboros.errors import OuroborosError

pytestmark = pytest.mark.usefixtures("alive")


def numbers(results):
    return [(r.arm, r.seed, r.score) for r in results]


def test_two_processes_give_what_one_gives(study_of, tmp_path):
    study = study_of(seeds=(1,))
    assert numbers(run_study(study, tmp_path / "two", workers=2)) == numbers(run_study(study, tmp_path / "one"))


def test_a_process_that_dies_is_named_and_the_study_goes_on_later(study_of, tmp_path, monkeypatch):
    study = study_of(seeds=(1,))
    with monkeypatch.context() as patch:
        patch.setattr(pool.sys, "executable", "false")
        with pytest.raises(OuroborosError, match="its process ended with status 1; what was done is kept"):
            run_study(study, tmp_path / "out", workers=2)
    assert len(run_study(dataclasses.replace(study), tmp_path / "out")) == 2


def test_all_processes_save_what_they_did_when_one_signal_asks_to_stop(study_of, tmp_path):
    """The signal comes with the line of the first cell that is complete, while the others are trained."""
    study = study_of(seeds=(1, 2), stages=(Stage(name="only", steps=300),))
    lines = []

    def tell(line):
        lines.append(line)
        if len(lines) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="stopped by SIGTERM; the same command goes on") as stopped:
        run_study(study, tmp_path / "out", workers=2, tell=tell)
    assert stopped.value.reason == "SIGTERM"
    begun = [path.parent for path in (tmp_path / "out" / "only").glob("*/seed-*/recipe.json")]
    assert 2 <= len(begun) < 5
    for path in begun:
        assert (path / "result.json").is_file() or any((path / "checkpoints").iterdir())
    assert len(run_study(study, tmp_path / "out", workers=2)) == 4
