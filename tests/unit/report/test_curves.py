"""The charts of a run's metrics."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ouroboros.report.content import Arm, LoopPoint, Report
from ouroboros.report.curves import (
    TELEMETRY,
    curves,
    loop_series,
    points,
    smoothed,
    telemetry,
    thinned,
)
from ouroboros.report.drawing import DARK, LIGHT, NUM_LOOPS, drawn


def svgs(section: Any) -> list[str]:
    """The pictures of a section."""
    return [drawn(chart) for chart in section.charts]


def texts(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("text")]


def loop_texts(*curve: LoopPoint, name: str = "x") -> list[str]:
    (svg,) = svgs(curves(Report(title="x", loop_curve={name: curve})))
    return texts(svg)


def test_loss_shows_arms_and_the_best_baseline(comparison: Report) -> None:
    section = curves(comparison)
    assert section is not None
    found = texts(svgs(section)[0])
    for wanted in ("loop, training", "loop, validation", "gpt, training", "xz", "step", "bits per byte"):
        assert wanted in found
    assert "order-4 n-gram" not in found


def test_one_record_is_enough() -> None:
    records = [{"kind": "train", "step": 1, "tokens": 10, "bits_per_byte": 2.0}, {"kind": "valid", "step": 1}]
    assert svgs(curves(Report(title="x", arms=[Arm(name="x", metrics=records)])))
    assert loop_texts(LoopPoint(loops=2, bits_per_byte=1.5))
    record = {"kind": "telemetry", "step": 1, "loops": [{"segment": 0, "loop": 0, "state_norm": 1.0}]}
    assert len(svgs(telemetry(Arm(name="x", metrics=[record]), "t"))) == 1


def test_nothing_to_draw_is_nothing() -> None:
    assert curves(Report(title="x", arms=[Arm(name="x")], loop_curve={"x": []})) is None
    assert telemetry(Arm(name="x", metrics=[{"kind": "train", "step": 1}]), "t") is None


def test_loop_counts_mark_the_trained_one_and_the_plain_arm(comparison: Report) -> None:
    found = texts(svgs(curves(comparison))[1])
    assert "loops in training" in found and "gpt, no loop" in found
    assert {"1", "2", "3", "4", "8"} <= set(found)
    untrained = [p._replace(trained=False) for p in comparison.loop_curve["loop"]]
    assert "loops in training" not in loop_texts(*untrained)


def test_a_loop_keeps_its_colour_where_the_first_has_no_value(comparison: Report) -> None:
    section = telemetry(comparison.arms[0], "t")
    assert section is not None and [chart.title for chart in section.charts] == [t for t, _ in TELEMETRY.values()]
    ratio, cosine = svgs(section)[:2]
    assert {"loop 1", "loop 2", "loop 3"} <= set(texts(ratio))
    assert "loop 1" not in texts(cosine) and "loop 3" in texts(cosine)
    assert DARK["loop0"] in ratio and DARK["loop0"] not in cosine
    assert DARK["loop5"] in ratio and DARK["loop5"] in cosine


def test_long_runs_and_many_loops_stay_small() -> None:
    records = [{"kind": "train", "step": s, "tokens": s, "bits_per_byte": 1 + 1 / s} for s in range(1, 20_001)]
    assert len(svgs(curves(Report(title="x", arms=[Arm(name="x", metrics=records)])))[0]) < 60_000
    entries = [{"segment": 0, "loop": i, "state_norm": float(i)} for i in range(64)]
    records = [{"kind": "telemetry", "step": s, "loops": entries} for s in range(500)]
    (svg,) = svgs(telemetry(Arm(name="x", metrics=records), "t"))
    assert len(svg) < 100_000
    shown = [text for text in texts(svg) if text.startswith("loop ")]
    assert len(shown) == NUM_LOOPS and {"loop 1", "loop 64"} <= set(shown)
    assert all(f"stroke: {LIGHT[f'loop{i}']}" in svg for i in range(NUM_LOOPS))


def test_two_looped_segments_are_told_apart() -> None:
    entries = [{"segment": s, "loop": i, "state_norm": 1.0 + i} for s in (0, 2) for i in range(2)]
    arm = Arm(name="x", metrics=[{"kind": "telemetry", "step": 1, "loops": entries}])
    assert {"part 1, loop 1", "part 3, loop 2"} <= set(texts(svgs(telemetry(arm, "t"))[0]))


numbers = st.lists(st.floats(-100, 100), min_size=1, max_size=50)


def test_points_takes_finite_pairs_of_one_kind() -> None:
    records = [
        {"kind": "train", "step": 1, "loss": 2.0},
        {"kind": "valid", "step": 1, "loss": 9.0},
        {"kind": "train", "step": 2, "loss": None},
        {"kind": "train", "step": 3},
        {"kind": "train", "step": 4, "loss": float("nan")},
        {"kind": "train", "step": 5, "loss": 1},
    ]
    assert points(records, "train", "step", "loss") == ([1.0, 5.0], [2.0, 1.0])


@given(numbers, st.floats(0.0, 100))
def test_smoothing_stays_within_the_values_seen(values: list[float], span: float) -> None:
    out = smoothed(values, span)
    assert len(out) == len(values)
    for i, mean in enumerate(out):
        assert min(values[: i + 1]) - 1e-9 <= mean <= max(values[: i + 1]) + 1e-9


def test_smoothing_is_the_corrected_average() -> None:
    assert smoothed([3.0, 3.0, 3.0], 5) == pytest.approx([3, 3, 3])
    # Two values: weights d(1-d) and (1-d), normalised.
    decay = 0.36787944117144233
    assert smoothed([0.0, 1.0], 1)[-1] == pytest.approx(1 / (1 + decay))
    assert smoothed([1.0, 5.0], 0) == pytest.approx([1, 5])


def test_thinning_keeps_pairs() -> None:
    xs = [float(i) for i in range(1000)]
    left, right = thinned(xs, xs, 50)
    assert left == right and len(left) == 50 and (left[0], left[-1]) == (0, 999)


def test_loop_series_by_segment_and_loop() -> None:
    first = [{"segment": 1, "loop": 1, "cosine": 0.5}, {"segment": 1, "loop": 0}]
    records = [
        {"kind": "telemetry", "step": 1, "loops": first},
        {"kind": "telemetry", "step": 2, "loops": [{"segment": 1, "loop": 1, "cosine": 0.4}]},
        {"kind": "telemetry", "step": 3, "loops": None},
        {"kind": "train", "step": 4},
    ]
    assert loop_series(records, "cosine") == {(1, 1): ([1.0, 2.0], [0.5, 0.4])}
