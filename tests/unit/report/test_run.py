from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ouroboros.accounting import cost
from ouroboros.config import DataSpec, to_json
from ouroboros.data.shards import prepare
from ouroboros.errors import OuroborosError
from ouroboros.recipes import recipe
from ouroboros.report import render, report_from_run
from ouroboros.report import run as module
from ouroboros.report.content import Section
from ouroboros.report.page import to_html


def score(loops: int | None, bits: float, **other: Any) -> dict[str, Any]:
    """A score as ``Score.to_dict`` gives it, with the keys that matter here."""
    common = {"window": 128, "stride": 64, "data_sha256": "ab" * 32, "bytes": 5000}
    return common | {"loops": loops, "bits_per_byte": bits, "interval": [bits - 0.1, bits + 0.1]} | other


def write_scores(run: Path, scores: Any) -> None:
    (run / "eval.json").write_text(json.dumps(scores), encoding="utf-8")


def test_run_without_scores_uses_its_last_validation(run_dir: Path) -> None:
    report = report_from_run(run_dir)
    (arm,) = report.arms
    assert report.title == "my-run: loop"
    assert arm.bits_per_byte == pytest.approx(1.52 + 4 * 2.718281828 ** (-200 / 40))
    assert arm.interval is None and any("last validation" in note and "step 200" in note for note in report.notes)
    assert (arm.tokens, arm.minutes, arm.tokens_per_second) == (20_000, pytest.approx(100 / 60), 205.0)
    expected = cost(recipe("loop", "tiny").model, context=64)
    assert (arm.parameters, arm.training_flops_per_token) == (expected.parameters, expected.training_flops_per_token)
    assert arm.stored_bytes == -(-expected.parameters * 3 // 4)
    assert report.loop_curve == {}


def test_scores_give_the_result_and_the_curve(run_dir: Path) -> None:
    write_scores(run_dir, [score(1, 3.0), score(2, 1.9), score(4, 2.5), score(2, 1.7)])
    report = report_from_run(run_dir)
    (arm,) = report.arms
    assert arm.bits_per_byte == 1.7 and arm.interval == pytest.approx((1.6, 1.8))
    curve = report.loop_curve["loop"]
    assert [(p.loops, p.bits_per_byte, p.trained) for p in curve] == [(1, 3.0, False), (2, 1.7, True), (4, 2.5, False)]
    assert report.notes == []
    assert report.environment["stride"] == 64


def test_scores_on_other_text_are_left_out_and_noted(run_dir: Path) -> None:
    write_scores(run_dir, [score(2, 9.0, data_sha256="cd" * 32), score(2, 1.7)])
    report = report_from_run(run_dir)
    assert report.arms[0].bits_per_byte == 1.7
    assert any("1 more scores on other text" in note for note in report.notes)


def test_one_score_object_is_enough(run_dir: Path) -> None:
    write_scores(run_dir, score(None, 1.6, interval=None))
    arm = report_from_run(run_dir).arms[0]
    assert (arm.bits_per_byte, arm.interval) == (1.6, None)


def test_plain_model_and_run_that_has_just_begun(run_dir: Path) -> None:
    (run_dir / "recipe.json").write_text(to_json(recipe("gpt", "tiny")), encoding="utf-8")
    (run_dir / "metrics.jsonl").write_text("")
    report = report_from_run(run_dir)
    assert report.arms[0].bits_per_byte is None and report.arms[0].tokens is None
    assert "The run has not logged anything yet." in report.notes
    render(report, run_dir / "report.html")


def test_page_of_a_run(run_dir: Path) -> None:
    write_scores(run_dir, [score(n, 1.5 + 0.1 * n) for n in (1, 2, 3)])
    render(report_from_run(run_dir), run_dir / "report.html")
    html = (run_dir / "report.html").read_text(encoding="utf-8")
    for wanted in ("loop reaches 1.700 bits per byte", 'id="curves"', "Inside the loops of loop", "1 (1)x2 1"):
        assert wanted in html
    assert 'id="results"' not in html and 'id="samples"' not in html


def test_torn_last_metrics_line_is_passed_over(run_dir: Path) -> None:
    before = report_from_run(run_dir)
    with (run_dir / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "valid", "step": 210, "bits_')
    assert dataclasses.asdict(report_from_run(run_dir)) == dataclasses.asdict(before)


def test_directories_that_are_no_run_are_named(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(OuroborosError, match=r"none does not exist; start a run with `ouroboros train"):
        report_from_run(tmp_path / "none")
    with pytest.raises(OuroborosError, match=r"is not a run directory \(no recipe\.json"):
        report_from_run(tmp_path)
    (run_dir / "metrics.jsonl").unlink()
    with pytest.raises(OuroborosError, match=r"metrics\.jsonl: cannot read: No such file"):
        report_from_run(run_dir)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("recipe.json", b"{", r"recipe\.json: not JSON"),
        ("recipe.json", b'{"name": "x", "model_": {}}', "did you mean 'model'"),
        ("recipe.json", b"\xff\xfe", r"recipe\.json: not UTF-8"),
        ("eval.json", b"[{]", r"eval\.json: expected scores"),
        ("eval.json", b"[1, 2]", r"eval\.json: expected scores"),
        ("eval.json", b'[{"bits_per_byte": null}]', r"eval\.json: expected scores"),
        ("eval.json", b"3", r"eval\.json: expected scores"),
    ],
)
def test_damaged_files_are_named(name: str, content: bytes, message: str, run_dir: Path) -> None:
    (run_dir / name).write_bytes(content)
    with pytest.raises(OuroborosError, match=message):
        report_from_run(run_dir)


def append(run: Path, *records: dict[str, Any]) -> None:
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records)


def test_early_end_and_failed_validations_are_told(run_dir: Path) -> None:
    failure = {"kind": "valid_failed", "error": "OSError: /home/somebody/x", "in_a_row": 1}
    append(run_dir, *(failure | {"step": step} for step in (20, 1_000)))
    append(run_dir, {"kind": "early_stop", "step": 200, "reason": "patience", "message": "3 validations in a row"})
    notes = report_from_run(run_dir).notes
    assert "Training stopped early, at step 200: 3 validations in a row." in notes
    assert "2 validations failed, so the curve has gaps." in notes
    assert not any("somebody" in note for note in notes)


def test_early_stop_that_was_gone_on_from_is_not_the_end(run_dir: Path) -> None:
    append(run_dir, {"kind": "early_stop", "step": 200, "reason": "target_loss", "message": "at the target"})
    append(run_dir, {"kind": "train", "step": 210, "tokens": 21_000, "bits_per_byte": 1.0})
    assert not any("stopped early" in note for note in report_from_run(run_dir).notes)


def write_data(run: Path, *sources: str) -> None:
    prepare(DataSpec(sources=sources, sequence_length=16), run / "data")


def test_page_of_a_run_with_data(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a<b>&c.jsonl", "d.jsonl"):
        lines = [json.dumps({"text": f"{name} {n} " + "word " * (n % 7)}) for n in range(60)]
        Path(name).write_text("\n".join(lines) + "\n" + '{"text": null}\n')
    write_data(run_dir, "a<b>&c.jsonl=3", "d.jsonl")
    report = report_from_run(run_dir)
    html = to_html(report)
    for wanted in (
        'id="data"',
        "a&lt;b&gt;&amp;c",
        "75.0 %",
        "no text (2)",
        "Read: 122 documents of 2 sources; kept: 120; dropped (1.6 %): no text (2).",
    ):
        assert wanted in html, wanted
    assert "a<b>" not in html and str(tmp_path) not in html
    assert html.count('class="numbers"') == 1
    assert [section.ident for section in report.sections] == ["data"]
    assert html == to_html(report)


def test_one_plain_text(run_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("All of this is one document. " * 40)
    write_data(run_dir, str(text))
    html = to_html(report_from_run(run_dir))
    assert 'id="data"' in html and "dropped (0.0 %): none" in html


def test_page_without_data_or_with_damaged_data_lacks_the_section(
    run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = report_from_run(run_dir)
    assert plain.sections == [] and 'id="data"' not in to_html(plain)
    (run_dir / "data").mkdir()
    (run_dir / "data" / "manifest.json").write_text('{"format_version": 1}')
    report = report_from_run(run_dir)
    assert report.sections == [] and "the part about the data is left out" in caplog.text
    lost = "says nothing of the data: files of the run that this takes are missing"
    assert any(lost in note for note in report.notes)
    assert str(tmp_path) not in to_html(report)


def test_what_systems_bring_is_asked_with_the_run(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def section(run: module.Run) -> Section | None:
        assert run.data is None and run.recipe.name == "loop" and run.metrics
        return Section(ident="toy", title=f"A toy in {run.directory.name}", headline="It works.")

    targets = {"a toy": section, "silence": lambda run: None}
    monkeypatch.setattr(module, "found", lambda place: dict.fromkeys(targets, "") if place == "sections" else {})
    monkeypatch.setattr(module, "load", lambda target: targets.pop(next(iter(targets))))
    report = report_from_run(run_dir)
    assert [one.title for one in report.sections] == ["A toy in my-run"]
    assert "<strong>It works.</strong>" in to_html(report)
