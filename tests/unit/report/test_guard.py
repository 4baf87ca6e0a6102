"""What the guard reported is a section of the run's page."""

from __future__ import annotations

from pathlib import Path

from ouroboros.report import report_from_run
from ouroboros.report.guard import MOST
from ouroboros.report.page import to_html
from ouroboros.report.text import MISSING
from ouroboros.train.guard import Alarm
from ouroboros.train.log import MetricsLog


def alarm(step: int, value: float, usual: float | None) -> dict:
    return Alarm(step, "loop 1 of segment 1", "state norm", value, usual, in_a_row=1, new=True).record()


BACK = {"kind": "rollback", "step": 16, "to_step": 3, "goes_on": True, "rollbacks": 1, "lr_factor": 0.5}


def log(run: Path, *records: dict) -> None:
    metrics = MetricsLog(run / "metrics.jsonl")
    for record in records:
        metrics.write(record)


def section(run: Path):
    return next((one for one in report_from_run(run).sections if one.ident == "guard"), None)


def test_a_run_without_alarms_has_no_such_section(run_dir: Path) -> None:
    assert section(run_dir) is None


def test_unusual_steps_and_what_was_done(run_dir: Path) -> None:
    log(run_dir, alarm(14, 97.81, 7.5), BACK, alarm(1020, float("nan"), None), {**BACK, "step": 1022, "goes_on": False})
    found = section(run_dir)
    assert found.headline == (
        "2 reports of unusual steps, the first at step 14 in loop 1 of segment 1, 2 returns to earlier weights."
    )
    (table,) = found.tables
    assert table.rows == [
        ("14", "loop 1 of segment 1", "state norm", "97.8", "7.5"),
        ("16", "the run", "back to the weights of step 3", "rate times 0.5", MISSING),
        ("1,020", "loop 1 of segment 1", "state norm", "not finite", MISSING),
        ("1,022", "the run", "back to the weights of step 3", "the run stops", MISSING),
    ]
    page = to_html(report_from_run(run_dir))
    assert "Stability" in page and "back to the weights of step 3" in page


def test_a_long_table_is_cut_and_says_so(run_dir: Path) -> None:
    log(run_dir, *(alarm(20 * n, 9.0, 1.0) for n in range(1, MOST + 6)))
    (table,) = section(run_dir).tables
    assert len(table.rows) == MOST and table.note == "5 later records are in metrics.jsonl."
