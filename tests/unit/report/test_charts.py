from __future__ import annotations

import dataclasses
from collections.abc import Callable
from xml.etree import ElementTree

import pytest

from ouroboros.report import Arm, LoopPoint, Report
from ouroboros.report.charts import TELEMETRY, loop_chart, loss_chart, telemetry_chart
from ouroboros.report.palette import LIGHT, NUM_LOOPS

Drawer = Callable[[Report], str]
DRAWERS: dict[str, Drawer] = {
    "loss": lambda report: loss_chart(report.arms, reference=report.rows[-1]),
    "loops": lambda report: loop_chart(report.loop_curve, report.arms),
    **{
        key: (lambda report, key=key: telemetry_chart(report.arms[0].metrics, key, ident=f"telemetry-{key}"))
        for key in TELEMETRY
    },
}


def texts(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("text")]


@pytest.mark.parametrize("name", DRAWERS)
def test_charts_are_valid_and_deterministic(name: str, comparison: Report) -> None:
    svg = DRAWERS[name](comparison)
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg") and root.get("aria-label")
    assert svg == DRAWERS[name](comparison)
    assert svg.count("http") == 1
    # A colour that is not of the palette would not follow the reader's colour scheme.
    for word in svg.replace(";", " ").replace('"', " ").replace(")", " ").split():
        assert not word.startswith("#") or word in LIGHT.values() or "-" in word, word


def test_loss_chart_shows_arms_and_reference(comparison: Report) -> None:
    found = texts(DRAWERS["loss"](comparison))
    for wanted in ("loop, training", "loop, validation", "gpt, training", "order-4 n-gram", "training tokens"):
        assert wanted in found
    assert "bits per byte" in found


def test_loss_chart_falls_back_on_steps() -> None:
    records = [{"kind": "train", "step": s, "bits_per_byte": 2.0} for s in range(1, 5)]
    assert "step" in texts(loss_chart([Arm(name="x", metrics=records)]))


def test_one_record_is_enough() -> None:
    records = [{"kind": "train", "step": 1, "tokens": 10, "bits_per_byte": 2.0}, {"kind": "valid", "step": 1}]
    assert loss_chart([Arm(name="x", metrics=records)])
    assert loop_chart({"x": [LoopPoint(loops=2, bits_per_byte=1.5)]})
    telemetry = [{"kind": "telemetry", "step": 1, "loops": [{"segment": 0, "loop": 0, "state_norm": 1.0}]}]
    assert telemetry_chart(telemetry, "state_norm", ident="t")


def test_nothing_to_draw_is_nothing() -> None:
    assert loss_chart([Arm(name="x")]) == ""
    assert loop_chart({}) == loop_chart({"x": [LoopPoint(loops=1, bits_per_byte=float("nan"))]}) == ""
    assert telemetry_chart([{"kind": "train", "step": 1}], "cosine", ident="t") == ""


def test_loop_chart_marks_the_trained_count_and_the_plain_arm(comparison: Report) -> None:
    found = texts(DRAWERS["loops"](comparison))
    assert "loops in training" in found and "gpt, no loop" in found
    assert {"1", "2", "3", "4", "8", "1.411"} <= set(found)
    untrained = {"loop": [dataclasses.replace(p, trained=False) for p in comparison.loop_curve["loop"]]}
    assert "loops in training" not in texts(loop_chart(untrained))


def test_a_loop_keeps_its_colour_where_the_first_has_no_value(comparison: Report) -> None:
    ratio, cosine = DRAWERS["update_ratio"](comparison), DRAWERS["cosine"](comparison)
    assert {"loop 1", "loop 2", "loop 3"} <= set(texts(ratio))
    assert "loop 1" not in texts(cosine) and "loop 3" in texts(cosine)
    assert "--loop0" in ratio and "--loop0" not in cosine
    assert "--loop5" in ratio and "--loop5" in cosine


def test_long_runs_and_many_loops_stay_small() -> None:
    records = [{"kind": "train", "step": s, "tokens": s, "bits_per_byte": 1 + 1 / s} for s in range(1, 20_001)]
    assert len(loss_chart([Arm(name="x", metrics=records)])) < 60_000
    entries = [{"segment": 0, "loop": i, "state_norm": float(i)} for i in range(64)]
    telemetry = [{"kind": "telemetry", "step": s, "loops": entries} for s in range(500)]
    svg = telemetry_chart(telemetry, "state_norm", ident="t")
    assert len(svg) < 100_000
    shown = [text for text in texts(svg) if text.startswith("loop ")]
    assert len(shown) == NUM_LOOPS and {"loop 1", "loop 64"} <= set(shown)
    assert all(f"--loop{i}," in svg for i in range(NUM_LOOPS))


def test_two_looped_segments_are_told_apart() -> None:
    entries = [{"segment": s, "loop": i, "state_norm": 1.0 + i} for s in (0, 2) for i in range(2)]
    found = texts(telemetry_chart([{"kind": "telemetry", "step": 1, "loops": entries}], "state_norm", ident="t"))
    assert {"part 1, loop 1", "part 3, loop 2"} <= set(found)


def test_loss_chart_draws_the_target_in_both_units() -> None:
    records = [{"kind": "train", "step": s, "bits_per_byte": 2.0} for s in range(1, 5)]
    records.append({"kind": "valid", "step": 4, "bits_per_byte": 2.0, "nats_per_token": 4.0})
    arm = Arm(name="x", metrics=records, target_loss=2.1)
    assert "target: 2.1 nats/token, 1.050 bits/byte" in texts(loss_chart([arm]))
    for other in (dataclasses.replace(arm, target_loss=None), dataclasses.replace(arm, metrics=records[:-1])):
        assert not any("target" in text for text in texts(loss_chart([other])))
