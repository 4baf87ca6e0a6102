"""The axis over depth and what is drawn along it."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest

from ouroboros.report.canvas import canvas
from ouroboros.report.depth import LEVELS, MAX_VISITS, Depth, cells, log_axis, matrix_edges, spread
from ouroboros.report.palette import LIGHT
from ouroboros.schedule import parse


def drawn(columns: list[list[float]], **options) -> tuple[list[str], str]:
    """The styles of the cells' shapes, and all path data."""
    with canvas("c") as drawing:
        edges = matrix_edges(max(map(len, columns)))
        lefts = [float(at) for at in range(len(columns))]
        drawing.axes.set_axis_off()
        cells(drawing.axes, columns, lefts=lefts, width=1, edges=edges, **options)
        drawing.axes.set_xlim(0, 3)
        drawing.axes.set_ylim(-0.5, 2.5)
        root = ElementTree.fromstring(drawing.svg("x"))
    paths = [
        e
        for e in root.iter("{http://www.w3.org/2000/svg}path")
        if "opacity" in e.get("style", "") or "arm" in e.get("style", "")
    ]
    return [e.get("style", "") for e in paths], " ".join(e.get("d", "") for e in paths)


def test_cells_of_one_shade_are_one_shape() -> None:
    styles, data = drawn([[1.0, 0.5], [0.5, 1.0], [0.0]], color="arm0")
    assert len(styles) == 2 and all("--arm0" in style for style in styles)
    assert data.count("M") == 4  # four cells, the empty one left out


def test_equal_neighbours_are_one_rectangle() -> None:
    assert drawn([[0.5, 0.5, 0.5]], color="arm0")[1].count("M") == 1
    assert drawn([[0.5, 0.5 + 0.1 / LEVELS]], color="arm0")[1].count("M") == 1


def test_negative_values_have_their_colour_or_stay_empty() -> None:
    both = drawn([[1.0, -1.0]], color="arm0", negative="arm1")[0]
    assert len(both) == 2 and "--arm1" in both[1]
    assert len(drawn([[1.0, -1.0]], color="arm0")[0]) == 1


def test_each_column_may_have_its_colour_and_values_are_clipped() -> None:
    styles = drawn([[7.0], [1.0]], color=["arm0", "arm1"])[0]
    assert ["--arm0" in styles[0], "--arm1" in styles[1]] == [True, True]
    assert not any(re.search(r"opacity: 0", style) for style in styles)


def ticks(layout: str) -> tuple[list[str], str, int]:
    """Tick labels, axis name, and how many lines mark loops."""
    with canvas("d") as drawing:
        Depth(parse(layout)).mark(drawing.axes)
        labels = [label.get_text() for label in drawing.axes.get_xticklabels()]
        return labels, drawing.axes.get_xlabel(), len(drawing.axes.lines)


def test_axis_without_a_loop() -> None:
    assert ticks("3") == (["0", "1", "2"], "block, in order", 0)
    assert ticks("30")[0] == [str(at) for at in range(0, 30, 3)]


def test_loops_are_shaded_and_their_starts_marked() -> None:
    times = chr(0xD7)
    assert ticks("1 (2)x3 1") == ([str(at) for at in range(8)], f"visit, in order (shaded: loop {times}3)", 2)
    assert ticks("(1)x2 1 (1)x4")[1:] == (f"visit, in order (shaded: loop {times}2 and {times}4)", 1 + 3)
    assert ticks("(1)x20")[2] == 0  # more lines than picture


def test_many_visits_are_thinned_out_evenly() -> None:
    depth = Depth(parse("2 (2)x40 1"))
    assert len(depth.slots) == MAX_VISITS and (depth.slots[0], depth.slots[-1]) == (0, 82)
    assert depth.place(82) == MAX_VISITS - 1
    assert depth.place(0, "mixer") < depth.place(0) < depth.place(0, "mlp")
    assert len(ticks("2 (2)x40 1")[0]) <= 12


def test_spread_draws_lines_and_dots() -> None:
    with canvas("s") as drawing:
        spread(drawing.axes, [0.0, 1.0], [(0, 1, 2, 3, 4), (1, 2, 3, 4, 5)], "arm0", "name")
        lines: list[Any] = list(drawing.axes.collections)
        thin, thick = (lines[at].get_segments() for at in (0, 1))
        assert len(thin) == len(thick) == 2
        assert thin[0][:, 1].tolist() == [0, 4] and thick[1][:, 1].tolist() == [2, 4]
        dots: Any = drawing.axes.lines[0]
        assert list(dots.get_ydata()) == [2, 3] and dots.get_color() == LIGHT["arm0"]


@pytest.mark.parametrize(("low", "high"), [(0.11, 0.19), (0.1, 8), (1e-6, 1e4), (3, 9)])
def test_logarithmic_axis_always_has_ticks(low: float, high: float) -> None:
    with canvas("l") as drawing:
        log_axis(drawing.axes, low, high)
        labels = [float(label.get_text()) for label in drawing.axes.get_yticklabels()]
        assert drawing.axes.get_ylim() == pytest.approx((labels[0], labels[-1]))
    assert 2 <= len(labels) <= 8 and labels == sorted(labels)
    assert low / 10 < labels[0] <= low and high <= labels[-1] < high * 10
