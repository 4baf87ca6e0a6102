from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ouroboros.errors import OuroborosError
from ouroboros.report.layout import SHOWN_VISITS, schedule_svg
from ouroboros.schedule import parse

NAMESPACE = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{NAMESPACE}text")]


def test_boxes_loop_and_visits() -> None:
    found = texts(schedule_svg("2 (2)x3 2"))
    assert found[0] == "tokens" and "logits" in found
    assert found.count("\u00d73") == 1
    assert "6 stored blocks, 10 visits in order:" in found
    start = found.index("6 stored blocks, 10 visits in order:") + 1
    assert found[start:] == [str(visit.block) for visit in parse("2 (2)x3 2").visits]
    assert sorted(found[1:start]).count("2") == 1


def test_plain_stack_has_no_return_arrow() -> None:
    assert not any(text.startswith("\u00d7") for text in texts(schedule_svg("1")))
    assert "1 stored block, 1 visit in order:" in texts(schedule_svg("1"))


def test_long_layouts_are_abridged() -> None:
    found = texts(schedule_svg("100"))
    assert "\u2026" in found and "99" in found
    assert f"and {100 - SHOWN_VISITS} more" in found
    assert len(schedule_svg("100")) < 20_000


segments = st.tuples(st.integers(1, 9), st.integers(1, 9), st.booleans())


@given(st.lists(segments, min_size=1, max_size=6))
def test_every_layout_is_drawn_inside_its_picture(parts: list[tuple[int, int, bool]]) -> None:
    layout = " ".join(f"({blocks})x{loops}" if looped else str(blocks) for blocks, loops, looped in parts)
    root = ElementTree.fromstring(schedule_svg(layout))
    width, height = float(root.get("width", "")), float(root.get("height", ""))
    for box in root.iter(f"{NAMESPACE}rect"):
        assert 0 <= float(box.get("x", "")) <= float(box.get("x", "")) + float(box.get("width", "")) <= width
        assert 0 <= float(box.get("y", "")) <= float(box.get("y", "")) + float(box.get("height", "")) <= height
    boxes = [(float(b.get("x", "")), float(b.get("y", ""))) for b in root.iter(f"{NAMESPACE}rect")]
    assert len(set(boxes)) == len(boxes)


def test_wrong_notation_is_an_error() -> None:
    with pytest.raises(OuroborosError, match="layout"):
        schedule_svg("(2)x0")
