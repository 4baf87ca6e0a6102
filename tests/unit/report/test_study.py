"""The page of a study and of a comparison, from records that are made by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ouroboros.ablate.alive import _key
from ouroboros.ablate.cells import DIVERGED
from ouroboros.ablate.changes import changed
from ouroboros.ablate.compare import ANSWER, judge
from ouroboros.ablate.record import RESULT, Measured, Packed, Result
from ouroboros.ablate.runner import ALIVE, MANIFEST
from ouroboros.ablate.study import Arm, Gate, Packing, Stage, Study
from ouroboros.config import to_dict, to_json
from ouroboros.errors import OuroborosError
from ouroboros.recipes import recipe
from ouroboros.report import report_from_study
from ouroboros.report.content import Report, Section
from ouroboros.report.markdown import to_markdown
from ouroboros.report.page import to_html

CONTROL = Arm(name="control", recipe=recipe("loop", "tiny"))
RATES = {"good": 0.02, "same": 0.03, "wild": 0.04, "twice": 0.05}
ARMS = tuple(Arm.changing(CONTROL, name, {"optim.lr": rate}) for name, rate in RATES.items())
STUDY = Study(
    name="rates",
    question="Which rate is best?",
    control=CONTROL,
    arms=ARMS,
    seeds=(1, 2, 3),
    stages=(Stage(name="short", steps=40, split="valid", gate=Gate(best=2)), Stage(name="long", steps=80)),
    packing=Packing(bits=6),
)
BITS = {"control": (2.0, 2.1, 2.2), "good": (1.9, 2.001, 2.099), "same": (2.03, 2.07, 2.21)}


def measured(bits: float) -> Measured:
    nats = (bits * 100 * math.log(2),) * 20
    facts: dict[str, Any] = {"stderr": None, "bytes": 2000, "data_sha256": "d", "window": 8, "stride": 4}
    return Measured(bits_per_byte=bits, unit_nats=nats, unit_bytes=(100,) * 20, **facts)


def result(arm: str, seed: int, bits: float, stage: str, gap: float = 0.01) -> Result:
    facts: dict[str, Any] = {"recipe": "", "train_sha256": "", "code": "c", "environment": {}, "layout": "2"}
    facts |= {"parameters": 9000, "weights_bytes": 36000, "flops_per_token": 54000, "steps": 40, "tokens": 4000}
    return Result(
        stage=stage,
        arm=arm,
        seed=seed,
        run=f"{stage}/{arm}/seed-{seed}",
        seconds=2.0,
        skipped=0,
        score=measured(bits),
        packed=Packed(bytes=7000, score=measured(bits + gap), feasible=arm != "same", exceptions=0),
        **facts,
    )


def keep(directory: Path, found: Result, metrics: list[dict[str, Any]]) -> None:
    run = directory / found.run
    run.mkdir(parents=True, exist_ok=True)
    (run / RESULT).write_text(to_json(found))
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))


def write(directory: Path, study: Study = STUDY, dead: Mapping[str, str] | None = None) -> Path:
    """The directory of a study with no runs."""
    directory.mkdir(exist_ok=True)
    manifest = {"study": to_dict(study), "code": "c", "environment": {"torch": "2"}}
    (directory / MANIFEST).write_text(json.dumps(manifest))
    control = to_dict(study.control)
    kept = {_key(control, to_dict(arm), "c"): (dead or {}).get(arm.name, "") for arm in study.arms}
    (directory / ALIVE).write_text(json.dumps(kept))
    return directory


@pytest.fixture
def study(tmp_path: Path, records_of: Any) -> Path:
    """Two stages; ``wild`` diverged with one seed, ``twice`` is dead."""
    directory = write(tmp_path / "study", dead={"twice": "this arm equals the control"})
    for stage in ("short", "long"):
        for arm, row in BITS.items():
            for seed, bits in enumerate(row, 1):
                gap = 0.03 if arm == "good" else 0.01
                keep(directory, result(arm, seed, bits, stage, gap), records_of(bits, loops=2, steps=40))
    for seed in (1, 2):
        keep(directory, result("wild", seed, 3.0, "short"), [])
    lost = directory / "short" / "wild" / "seed-3"
    lost.mkdir()
    (lost / DIVERGED).write_text("2 steps in a row had a non-finite loss\n")
    return directory


def sections(report: Report) -> dict[str, Section]:
    return {section.ident: section for section in (*report.findings, *report.sections)}


def test_arms_are_ranked_by_their_difference_and_the_last_stage_answers(study: Path) -> None:
    report = report_from_study(study)
    assert report.title == STUDY.question
    assert report.headline.startswith("Against control, in bits per byte: better: good (-0.1000); not told apart")
    assert [section.ident for section in report.findings] == ["stage-long", "stage-short"]
    before, after = report.findings[0].rankings
    assert [(row.name, row.mark) for row in before.rows] == [
        ("good", "better"),
        ("control", "control"),
        ("same", "cannot tell"),
    ]
    good = before.rows[0]
    assert good.low is not None and good.high is not None and good.low < good.bits_per_byte < good.high < 0
    assert good.bits_per_byte == pytest.approx(-0.1) and after.rows[0].bits_per_byte == pytest.approx(-0.08)
    cost, packed = report.findings[0].tables
    assert cost.rows[0][:4] == ["good", "2.0000", "0.0995", "3"] and "216 M" in cost.rows[0]
    assert packed.rows[0][1:5] == ["2.0000", "2.0300", "+0.0300", "+0.0200"] and "budget: same" in packed.note
    assert any("Kendall's tau of +1.00" in note for note in report.notes)


def test_arms_without_a_result_stand_below_with_the_reason(study: Path) -> None:
    short = sections(report_from_study(study))["stage-short"]
    absent = {one.name: (one.mark, one.detail) for one in short.rankings[0].absent}
    assert absent["wild"] == ("diverged", "With seed 3: 2 steps in a row had a non-finite loss.")
    assert absent["twice"] == ("dead", "this arm equals the control") and len(absent) == 2
    assert "promoted: the best 2: good, same" in short.lead
    assert [row[0] for row in short.tables[0].rows] == ["good", "control", "same", "wild"]


def test_the_dead_of_a_study_of_an_earlier_release_are_known(study: Path) -> None:
    values = json.loads((study / MANIFEST).read_text())
    arms = [values["study"]["control"], *values["study"]["arms"]]
    for arm in arms:  # a field that this release has and that one had not
        del arm["recipe"]["train"]["patience"]
    (study / MANIFEST).write_text(json.dumps(values))
    (study / ALIVE).write_text(json.dumps({_key(arms[0], arms[-1], "c"): "it was dead"}))
    absent = {one.name: one for one in sections(report_from_study(study))["stage-short"].rankings[0].absent}
    assert absent["twice"] == ("twice", "dead", "it was dead")


def test_each_ranking_has_its_own_order_and_what_lacks_runs_comes_last(study: Path, records_of: Any) -> None:
    for seed in (1, 2):
        keep(study, result("wild", seed, 1.0, "short"), [])
    for seed, bits in enumerate(BITS["good"], 1):
        keep(study, result("good", seed, bits, "short", 0.5), [])
    short = sections(report_from_study(study))["stage-short"]
    orders = [[row.name for row in ranking.rows] for ranking in short.rankings]
    assert orders == [["good", "control", "same"], ["control", "same", "good"]]
    assert short.tables[0].rows[-1][0] == "wild"


def test_a_study_under_way_counts_the_seeds_that_are_there(study: Path) -> None:
    for arm in ("control", "good"):
        (study / "long" / arm / "seed-3" / RESULT).unlink()
    report = report_from_study(study)
    assert "Not counted, because runs of it are missing: seed 3 of stage long." in report.notes
    assert (
        report.headline.startswith("So far, with runs missing: Against control")
        and "seeds 1, 2," in report.findings[0].lead
    )
    (study / "long" / "same" / "seed-2" / RESULT).unlink()
    (absent,) = report_from_study(study).findings[0].rankings[0].absent
    assert absent == ("same", "unfinished", "There is no result of seed 2 yet.")
    for path in study.glob("long/*/*/result.json"):
        path.unlink()
    report = report_from_study(study)
    assert [section.ident for section in report.findings] == ["stage-short"] and report.headline.startswith("So far")
    for path in study.glob("short/control/*/result.json"):
        path.unlink()
    with pytest.raises(OuroborosError, match="too few runs are done to compare any arm with 'control'"):
        report_from_study(study)


def test_curves_and_telemetry_are_means_over_seeds(study: Path) -> None:
    report = report_from_study(study)
    (good,) = (arm for arm in report.arms if arm.name == "good")
    assert good.description == "optim.lr: 0.01 \u2192 0.02" and report.arms[0].description == "the control"
    first = next(record for record in good.metrics if record["kind"] == "train")
    assert first["step"] == 10 and first["bits_per_byte"] == pytest.approx(2.0 + 4 * math.exp(-0.25))
    training, loops = sections(report)["numbers"].tables
    assert [row[0] for row in training.rows] == ["good", "control", "same"] and len(training.rows[0]) == 5
    assert loops.rows[0][1:4] == ["1, 0.5", "\u2013, 0.2", "1, 2"]


def test_page_and_markdown_say_the_same(study: Path) -> None:
    report = report_from_study(study)
    html, text = to_html(report), to_markdown(report)
    assert html.count('class="card ranking"') == 4 and "Inside the loops of good" in html and html.count("<img") == 13
    for words in ("Which rate is best?", "cannot tell", "diverged", "this arm equals the control", "+0.0200"):
        assert words in html and words in text, words
    assert "| good | \u22120.1000 |" in text and "<" not in text.replace("\\<", "")
    widths = [{line.count(" | ") for line in block.splitlines()} for block in text.split("\n\n") if block[:1] == "|"]
    assert len(widths) == 10 and all(len(width) == 1 for width in widths)


def test_many_arms_are_all_ranked_and_some_drawn(tmp_path: Path, records_of: Any) -> None:
    rates = [Arm.changing(CONTROL, f"arm-{n}", {"optim.lr": 0.02 + n / 1000}) for n in range(9)]
    many = dataclasses.replace(
        STUDY, arms=tuple(rates), stages=(Stage(name="only", steps=9),), packing=None, seeds=(1,)
    )
    directory = write(tmp_path / "many", many)
    for number, arm in enumerate(many.every_arm):
        keep(directory, result(arm.name, 1, 2 + number / 9, "only"), records_of(2.0, steps=40))
    report = report_from_study(directory)
    assert len(report.findings[0].rankings[0].rows) == len(report.arms) == 10 and len(report.findings[0].rankings) == 1
    assert [bool(arm.metrics) for arm in report.arms] == [True] * 6 + [False] * 4
    assert any("one seed" in note for note in report.notes) and any("at most 5 arms" in note for note in report.notes)
    assert "+0.1111" in to_html(report)


def test_what_an_arm_changes_in_single_blocks_is_named_and_not_the_whole_list(tmp_path: Path, records_of: Any) -> None:
    def overrides(**values: Any) -> list[dict[str, Any]]:
        return [{"where": "0", "set": {"norm.depth": 2, **values}}]

    relu = overrides(ffn={"kind": "relu2", "intermediate_size": 16})
    control = Arm(name="control", recipe=changed(CONTROL.recipe, {"model.overrides": relu}))
    arms = {
        "wide": overrides(ffn={"kind": "relu2", "intermediate_size": 24}),
        "other": overrides(ffn={"kind": "swiglu", "intermediate_size": 16}),
        "more": [*relu, {"where": "1", "set": {"norm.depth": 2}}],
    }
    made = tuple(Arm.changing(control, name, {"model.overrides": values}) for name, values in arms.items())
    stage = Stage(name="only", steps=9)
    study = dataclasses.replace(STUDY, control=control, arms=made, stages=(stage,), packing=None, seeds=(1,))
    directory = write(tmp_path / "study", study)
    for arm in study.every_arm:
        keep(directory, result(arm.name, 1, 2.0, "only"), records_of(2.0, steps=40))
    said = {arm.name: arm.description for arm in report_from_study(directory).arms}
    assert said["wide"] == "model.overrides.0.set.ffn.intermediate_size: 16 \u2192 24"
    assert said["other"] == "model.overrides.0.set.ffn: relu2 \u2192 swiglu"
    assert said["more"].startswith("model.overrides: [{")


@pytest.mark.parametrize("packed", [False, True])
def test_a_comparison_is_told_from_its_own_verdict(tmp_path: Path, records_of: Any, packed: bool) -> None:
    twin = Arm(name="plain", recipe=changed(CONTROL.recipe, {"optim.lr": 0.02}))
    study = Study(
        name="compare",
        question="Is control better than a plain model?",
        control=CONTROL,
        arms=(twin,),
        seeds=(1, 2, 3),
        stages=(Stage(name="runs", steps=40),),
        packing=Packing(bits=6) if packed else None,
    )
    directory = write(tmp_path / "compared", study)
    runs = {
        name: [result(arm, seed, bits, "runs") for seed, bits in enumerate(BITS[row], 1)]
        for name, arm, row in (("own", "control", "good"), ("plain", "plain", "control"))
    }
    for one in (*runs["own"], *runs["plain"]):
        keep(directory, one, records_of(2.0, steps=40))
    plain = judge("parameters", runs["own"], {"plain": runs["plain"]}).to_dict()
    answer = plain | {"left_out": {"deep": "dead"}}
    if packed:
        file = judge("bytes", runs["own"], {"plain": runs["plain"]}, packed=True).to_dict()
        answer = {"matches": [answer, file | {"packed": file, "unpacked": plain | {"match": "bytes"}, "left_out": {}}]}
    (directory / ANSWER).write_text(json.dumps(answer))
    report = report_from_study(directory)
    rows = report.findings[0].rankings[0].rows
    assert [(row.name, row.mark) for row in rows] == [("control", "control"), ("plain", "worse")]
    assert rows[1].bits_per_byte == pytest.approx(0.1) and rows[1].low is not None and rows[1].low > 0
    assert report.findings[0].rankings[0].absent == [("deep", "dead", "dead")]
    if packed:
        assert (
            report.headline == "control against its twins: win at equal stored parameters, win at equal packed bytes."
        )
        assert [len(section.rankings) for section in report.findings] == [1, 2]
        assert report.findings[1].headline.startswith("control wins at equal packed bytes, packed")
    else:
        assert report.headline.startswith("control wins at equal stored parameters: it needs 0.1000 bits per byte less")
    assert "At equal stored parameters" in to_html(report)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (MANIFEST, "{", "study.json: expected a JSON object"),
        (MANIFEST, "{}", "study.json: not a study's"),
        (MANIFEST, '{"study": {}, "code": "", "environment": {}}', "study.json"),
        (ALIVE, "[", "alive.json"),
        (ANSWER, '{"matches": 3}', "compare.json"),
        (ANSWER, '{"match": "size"}', "compare.json"),
        ("long/good/seed-1/result.json", "{", "result.json"),
    ],
)
def test_damaged_files_are_named(study: Path, name: str, content: str, words: str) -> None:
    (study / name).write_text(content)
    with pytest.raises(OuroborosError, match=words):
        report_from_study(study)
