from __future__ import annotations

import dataclasses

from ouroboros.eval.baselines import Baseline
from ouroboros.eval.stats import Difference
from ouroboros.report.content import Arm, Report, verdict_sentence


def difference(low: float, high: float) -> Difference:
    verdict = "better" if high < 0 else "worse" if low > 0 else "cannot tell"
    return Difference(delta=(low + high) / 2, stderr=0.01, low=low, high=high, verdict=verdict, units=10)


def test_verdict_names_the_winner_or_says_that_nobody_can_tell() -> None:
    assert verdict_sentence("a", "b", difference(-0.03, -0.01)).startswith("a wins: it needs 0.020 bits per byte less")
    worse = verdict_sentence("a", "b", difference(0.01, 0.03))
    assert worse.startswith("b wins") and "less than a" in worse and "0.010 to 0.030" in worse
    even = verdict_sentence("a", "b", difference(-0.03, 0.01))
    assert even.startswith("Cannot tell") and "-0.030 to +0.010" in even
    unknown = Difference(delta=-1.0, stderr=None, low=None, high=None, verdict="cannot tell", units=1)
    assert verdict_sentence("a", "b", unknown).startswith("Cannot tell")


def test_rows_are_sorted_and_the_best_is_marked(comparison: Report) -> None:
    rows = comparison.rows
    assert [row.name for row in rows] == ["loop", "gpt", "xz", "order-4 n-gram"]
    assert [row.mark for row in rows] == ["best", "", "", ""]
    assert [row.arm for row in rows] == [0, 1, None, None]
    assert (rows[0].low, rows[0].high) == (1.39, 1.43)


def test_a_baseline_can_be_the_best(comparison: Report) -> None:
    strong = dataclasses.replace(comparison, baselines=[Baseline(name="xz", bytes=1, train_bytes=1, bits_per_byte=1.2)])
    assert (strong.rows[0].name, strong.rows[0].mark, strong.rows[1].mark) == ("xz", "best", "")


def test_arms_that_cannot_be_told_apart_are_level(comparison: Report) -> None:
    even = dataclasses.replace(comparison, difference=difference(-0.03, 0.01))
    assert [row.mark for row in even.rows] == ["level", "level", "", ""]


def test_baselines_have_the_interval_that_they_were_given() -> None:
    baselines = [
        Baseline(name="b", bytes=1, train_bytes=1, bits_per_byte=3.0, stderr=0.1, interval=(2.5, 3.5)),
        Baseline(name="c", bytes=1, train_bytes=1, bits_per_byte=4.0),
    ]
    rows = Report(title="x", baselines=baselines).rows
    assert [(row.low, row.high) for row in rows] == [(2.5, 3.5), (None, None)]


def test_scores_that_are_not_finite_have_no_row() -> None:
    report = Report(title="x", arms=[Arm(name="nan", bits_per_byte=float("nan")), Arm(name="none")])
    assert report.rows == []
