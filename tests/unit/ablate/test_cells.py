"""One cell: interrupted anywhere it goes on, packed it is scored again, several processes may train it."""

import dataclasses
import errno

import pytest

from ouroboros.ablate import cells
from ouroboros.ablate.runner import run_study
from ouroboros.ablate.study import Packing, Stage
from ouroboros.errors import OuroborosError

pytestmark = pytest.mark.usefixtures("alive")


def test_a_packed_cell_is_scored_again(study_of, tmp_path):
    packing = Packing(bits=4, mode="rounding", calibration_tokens=64)
    for result in run_study(study_of(seeds=(1,), packing=packing), tmp_path / "out"):
        file = tmp_path / "out" / result.run / cells.PACKED
        assert result.packed.bytes == file.stat().st_size and result.packed.feasible
        assert result.packed.score.unit_bytes == result.score.unit_bytes
        assert 0 < abs(result.packed.score.bits_per_byte - result.bits_per_byte) < 0.5


def test_a_full_disk_is_one_line_and_nothing_is_lost(study_of, tmp_path, monkeypatch):
    study, measure = study_of(seeds=(1,)), cells._measure

    def full(cell):
        if cell.arm == "lr":
            raise OSError(errno.ENOSPC, "No space left on device", str(cell.path))
        return measure(cell)

    with monkeypatch.context() as patch:
        patch.setattr(cells, "_measure", full)
        with pytest.raises(OuroborosError, match="arm lr, seed 1: .*No space left on device; what was done is kept"):
            run_study(study, tmp_path / "out")
    monkeypatch.setattr(cells, "train", None)  # both are trained, and are not trained again
    assert [r.arm for r in run_study(study, tmp_path / "out")] == ["control", "lr"]


def test_the_text_is_shared_and_not_copied(study_of, tmp_path):
    results = run_study(study_of(seeds=(1,)), tmp_path / "out")
    places = [tmp_path / "out" / result.run / "data" / "0-train.bin" for result in results]
    (prepared,) = (tmp_path / "out" / "data").glob("*/0-train.bin")
    assert all(place.samefile(prepared) for place in places)


def test_two_processes_train_one_cell(study_of, tmp_path):
    study = study_of(seeds=(1,))
    arms = tuple(dataclasses.replace(arm, processes=2) for arm in study.arms)
    results = run_study(dataclasses.replace(study, arms=arms), tmp_path / "out")
    assert results[1].steps == 2 and results[1].tokens == results[0].tokens


def test_two_processes_that_diverge_say_why(study_of, tmp_path):
    changes = {"lr": {"optim.lr": 0.02}, "wild": {"optim.lr": 1e30}}
    study = study_of(changes, seeds=(1,), stages=(Stage(name="only", steps=30),))
    arms = tuple(dataclasses.replace(arm, processes=2 if arm.name == "wild" else 1) for arm in study.arms)
    results = run_study(dataclasses.replace(study, arms=arms), tmp_path / "out")
    assert [r.arm for r in results] == ["control", "lr"]
    assert "non-finite" in (tmp_path / "out" / "only" / "wild" / "seed-1" / "diverged.txt").read_text()


def test_an_error_names_the_cell(study_of, tmp_path, monkeypatch):
    def failing(cell):
        raise OuroborosError("no good")

    monkeypatch.setattr(cells, "train", failing)
    with pytest.raises(OuroborosError, match="2 of 2 cells of stage only failed: stage only, arm control, seed 1: no"):
        run_study(study_of(seeds=(1,)), tmp_path / "out")
