"""A study as a whole: order, gates, what is refused, what is not run again."""

import dataclasses
import json

import pytest

from ouroboros.ablate import cells as cells_module
from ouroboros.ablate.changes import changed
from ouroboros.ablate.record import read_result
from ouroboros.ablate.runner import pairs, promoted, run_study
from ouroboros.ablate.study import Arm, Gate, Stage
from ouroboros.errors import Diverged, OuroborosError

pytestmark = pytest.mark.usefixtures("alive")


@pytest.fixture
def ran(study_of, tmp_path):
    study = study_of()
    return study, tmp_path / "out", run_study(study, tmp_path / "out")


def test_arms_take_turns_and_every_cell_has_its_result(ran):
    study, out, results = ran
    assert [(r.arm, r.seed) for r in results] == [("control", 1), ("lr", 1), ("control", 2), ("lr", 2)]
    for result in results:
        assert read_result(out / result.run) == result and not (out / result.run / "checkpoints").exists()
        assert result.steps == 2 and result.tokens == 128 and result.parameters > 0 and result.weights_bytes > 0
        assert sum(result.score.unit_bytes) == result.score.bytes
        assert (out / result.run / "metrics.jsonl").is_file()
    assert len({r.bits_per_byte for r in results}) == 4
    compared = pairs(study, study.stages[0], results)
    assert compared["lr"].by_seed[0] == pytest.approx(results[1].bits_per_byte - results[0].bits_per_byte)


def test_the_same_command_runs_nothing_again_and_more_seeds_add_to_it(ran, monkeypatch):
    study, out, results = ran
    with monkeypatch.context() as patch:
        patch.setattr(cells_module, "train", None)
        assert run_study(study, out) == results
    more = run_study(dataclasses.replace(study, seeds=(1, 2, 3)), out)
    assert more[:4] == results and [r.seed for r in more[4:]] == [3, 3]


def test_results_of_other_data_code_or_settings_are_not_mixed(ran, monkeypatch, small_text, tmp_path):
    study, out, _ = ran
    with monkeypatch.context() as patch:
        patch.setattr("ouroboros.ablate.runner.code_version", lambda: "9.9+abc")
        with pytest.raises(OuroborosError, match=r"cannot be mixed with new ones: the code was .* and is 9.9\+abc"):
            run_study(study, out)
    other = tmp_path / "other"
    other.mkdir()
    for path in sorted(small_text.iterdir()):
        (other / path.name).write_text(path.read_text().upper())
    arms = [dataclasses.replace(a, recipe=changed(a.recipe, {"data.sources": [str(other)]})) for a in study.every_arm]
    with pytest.raises(OuroborosError, match="the train text of arm control was .* the test text of arm control was"):
        run_study(dataclasses.replace(study, control=arms[0], arms=tuple(arms[1:])), out)
    faster = Arm.changing(study.control, "lr", {"optim.lr": 0.03})
    with pytest.raises(OuroborosError, match=r"arm lr: optim.lr was 0.02 and is 0.03"):
        run_study(dataclasses.replace(study, arms=(faster,)), out)
    with pytest.raises(OuroborosError, match="stage only: steps was 2 and is 3"):
        run_study(dataclasses.replace(study, stages=(Stage(name="only", steps=3),)), out)
    with pytest.raises(OuroborosError, match="stage only: gate was None and is"):
        run_study(dataclasses.replace(study, stages=(Stage(name="only", steps=2, gate=Gate(best=1)),)), out)


def test_a_result_of_other_code_is_refused_by_name(ran):
    study, out, results = ran
    path = out / results[3].run / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"code": "0.0+other"}))
    with pytest.raises(OuroborosError, match="stage only, arm lr, seed 2 differ in code"):
        run_study(study, out)


def test_gates_decide_who_goes_on(study_of, tmp_path):
    changes = {"lr": {"optim.lr": 0.02}, "still": {"optim.lr": 1e-9}}
    stages = (Stage(name="short", steps=2, seeds=(7,), split="valid", gate=Gate(best=1)), Stage(name="long", steps=3))
    study = study_of(changes, stages=stages, seeds=(1,), repeats=1)
    results = run_study(study, tmp_path / "out")
    assert [r.arm for r in results] == ["control", "lr", "still", "control-again-1", "control", "lr"]
    assert [r.seed for r in results] == [7, 7, 7, 7, 1, 1]
    assert results[0].score.data_sha256 != results[4].score.data_sha256
    assert results[0].bits_per_byte == results[3].bits_per_byte
    assert promoted(study, stages[0], results) == ["lr"]


def test_an_arm_that_diverges_is_left_out_and_not_tried_again(study_of, tmp_path):
    changes = {"lr": {"optim.lr": 0.02}, "wild": {"optim.lr": 1e30}}
    study = study_of(changes, seeds=(1,), stages=(Stage(name="only", steps=30),))
    lines = []
    results = run_study(study, tmp_path / "out", tell=lines.append)
    assert [r.arm for r in results] == ["control", "lr"]
    assert any("arm wild, seed 1" in line and "non-finite" in line for line in lines)
    again = len(lines)
    assert run_study(study, tmp_path / "out", tell=lines.append) == results
    assert any("arm wild, seed 1" in line and "non-finite" in line for line in lines[again:])


def test_an_arm_that_its_guard_stops_or_whose_score_is_not_finite_has_diverged(study_of, tmp_path, monkeypatch):
    def measured(cell):
        if cell.arm == "wild":
            raise Diverged("document 0: the score of token 3 is nan; the model gives NaN or probability 0")
        return measure(cell)

    measure = cells_module._measure
    monkeypatch.setattr(cells_module, "_measure", measured)
    study = study_of({"lr": {"optim.lr": 0.02}, "wild": {"optim.lr": 0.5}}, seeds=(1,))
    lines = []
    results = run_study(study, tmp_path / "out", tell=lines.append)
    assert [r.arm for r in results] == ["control", "lr"]
    assert any("arm wild, seed 1: document 0: the score" in line and "goes on without" in line for line in lines)
    monkeypatch.setattr(cells_module, "_measure", None)
    assert run_study(study, tmp_path / "out") == results


def test_an_arm_that_comes_back_with_another_recipe_is_not_given_the_old_result(ran, monkeypatch):
    study, out, _ = ran
    without = dataclasses.replace(study, arms=(Arm.changing(study.control, "other", {"optim.lr": 0.04}),))
    run_study(without, out)
    changed_arm = Arm.changing(study.control, "lr", {"optim.lr": 0.03})
    with pytest.raises(OuroborosError, match=r"lr/seed-1: holds the result of another recipe than arm 'lr' has now"):
        run_study(dataclasses.replace(study, arms=(changed_arm,)), out)
    run_study(without, out)
    for path in (out / "only" / "lr").glob("seed-*/result.json"):
        path.unlink()
    with pytest.raises(OuroborosError, match=r"holds a run of another recipe, which differs in optim.lr; remove it"):
        run_study(dataclasses.replace(study, arms=(changed_arm,)), out)


def test_another_number_of_processes_is_refused(ran):
    study, out, _ = ran
    two = dataclasses.replace(study.arms[0], processes=2)
    with pytest.raises(OuroborosError, match="arm lr: processes was 1 and is 2"):
        run_study(dataclasses.replace(study, arms=(two,)), out)


def test_a_seed_missing_on_one_side_is_named(ran):
    study, _, results = ran
    with pytest.raises(OuroborosError, match=r"the control 'control' has no result of seed \[2\]"):
        pairs(study, study.stages[0], [r for r in results if (r.arm, r.seed) != ("control", 2)])
    assert pairs(study, study.stages[0], [r for r in results if (r.arm, r.seed) != ("lr", 2)]) == {}


def test_arms_with_other_held_out_text_are_refused(study_of, tmp_path):
    study = study_of({"more": {"data.test_fraction": 0.3}})
    with pytest.raises(OuroborosError, match="arm 'more': its test text is not that of the control"):
        run_study(study, tmp_path / "out")


def test_a_directory_of_something_else_is_refused(study_of, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OuroborosError, match="is no study's directory and not empty"):
        run_study(study_of(), tmp_path)


def test_runs_of_a_stage_are_compiled_all_or_none_and_a_later_command_keeps_that(study_of, tmp_path, monkeypatch):
    """A measurement near the limit would have some runs compiled and others not."""
    seen = []

    def kept(cell):
        seen.append(cell.pinned.train.compile)
        raise OuroborosError("enough")

    monkeypatch.setattr(cells_module, "train", kept)
    study = study_of({"lr": {"optim.lr": 0.02}}, seeds=(1,))
    open_choice = [dataclasses.replace(a, recipe=changed(a.recipe, {"train.compile": "auto"})) for a in study.every_arm]
    study = dataclasses.replace(study, control=open_choice[0], arms=tuple(open_choice[1:]))
    answers = iter([True, False])
    monkeypatch.setattr("ouroboros.ablate.runner.compile_pays", lambda *_: next(answers))
    for _ in range(2):
        with pytest.raises(OuroborosError, match="enough"):
            run_study(study, tmp_path / "out")
    assert seen == ["on"] * 4
