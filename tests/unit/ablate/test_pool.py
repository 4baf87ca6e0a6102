"""Cells in several processes give what they give in one."""

import dataclasses

import pytest

from ouroboros.ablate import pool
from ouroboros.ablate.runner import run_study
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
