"""One image for each chart, and the shapes that sections draw."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ouroboros.errors import OuroborosError
from ouroboros.report.drawing import (
    COLORS,
    DARK,
    LIGHT,
    MAX_VISITS,
    NUM_ARMS,
    Chart,
    arm_color,
    drawn,
    evenly,
    heat,
    label,
    level,
    scale_colors,
    shown_visits,
    styled_figure,
)
from ouroboros.schedule import parse


def line(**options: Any) -> Chart:
    draw = lambda axes: axes.plot([0, 1], [0, 1], color=LIGHT["arm0"], label=label("_$a^$ <b> \x00 \u4e2d"))  # noqa: E731
    return Chart(title="A line", draw=draw, y="height", **{"x": "steps", **options})


def test_a_picture_is_one_image_with_its_own_style_sheet() -> None:
    svg = drawn(line())
    assert svg == drawn(line())
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg") and "$a^$ &lt;b&gt; \ufffd \u4e2d" in svg
    dark = re.search(r"<style>.*@media \(prefers-color-scheme: dark\)\{(.*)\}</style>", svg)
    assert dark is not None
    assert f'[style*="stroke: {LIGHT["arm0"]}"]{{stroke:{DARK["arm0"]}!important}}' in dark.group(1)
    # Every colour that is drawn follows the reader's screen.
    drawing = svg.replace(dark.group(), "")
    for attribute, color in set(re.findall(r"(fill|stroke): (#[0-9a-f]{6})", drawing)):
        assert f"{attribute}: {color}" in dark.group(1), color
    assert LIGHT["arm1"] not in svg and "<dc:date" not in svg


def test_settings_do_not_leak_and_pyplot_stays_out() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    drawn(line())
    assert dict(matplotlib.rcParams) == before


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OuroborosError, match=r"matplotlib.*pip install 'ouroboros-lm\[report\]'"):
        drawn(line())


@pytest.mark.parametrize("legend", [0, 2])
def test_a_legend_stands_inside_or_above(legend: int) -> None:
    texts = [e.text for e in ElementTree.fromstring(drawn(line(legend=legend))).iter() if e.tag.endswith("text")]
    assert "$a^$ <b> \ufffd \u4e2d" in texts and {"height", "steps"} <= set(texts)


def test_label_is_never_hidden() -> None:
    assert label("__x\n y") == "x y"
    assert label("_") == label(" ") == "unnamed"


@given(st.integers(1, 1000), st.integers(2, 50))
def test_evenly_keeps_the_ends_and_the_order(length: int, limit: int) -> None:
    found = evenly(range(length), limit)
    assert found == sorted(set(found)) and len(found) == min(length, limit)
    assert found[0] == 0 and found[-1] == length - 1


def luminance(value: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    channels = [int(value[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_are_distinct_and_legible(colors: dict[str, str]) -> None:
    assert all(re.fullmatch(r"#[0-9a-f]{6}", value) for value in colors.values())
    assert len(set(colors.values())) == len(COLORS)
    for name in ("ink", "soft"):
        assert min(contrast(colors[name], colors[back]) for back in ("card", "page", "wash")) >= 4.5, name
    for name in colors:
        if name.startswith(("arm", "loop")):
            assert contrast(colors[name], colors["card"]) >= (4 if name.startswith("arm") else 2.8), name


def test_colours_of_arms_repeat_and_those_of_loops_spread() -> None:
    assert arm_color(NUM_ARMS) == arm_color(0) == "arm0"
    assert scale_colors(1) == [LIGHT["loop0"]] and scale_colors(2) == [LIGHT["loop0"], LIGHT["loop5"]]
    assert scale_colors(6) == [LIGHT[f"loop{i}"] for i in range(6)]


def on_axes(draw: Callable[[Any], None]) -> Any:
    """Axes that were drawn on."""
    with styled_figure(5, 3) as figure:
        axes = figure.add_subplot()
        draw(axes)
        return axes


def test_heat_is_transparent_where_nothing_is_and_coloured_by_column() -> None:
    values = np.array([[0.0, 1.0], [0.5, 7.0]])
    axes = on_axes(lambda axes: heat(axes, values, (0, 2, 0, 2), ["arm0", "arm2"]))
    (image,) = axes.images
    picture = image.get_array()
    assert picture[..., 3].tolist() == [[0, 1], [0.5, 1]]
    assert picture[0, 0, :3].argmax() == 1 and picture[0, 1, :3].argmax() == 2
    assert image.get_extent() == [0, 2, 0, 2]


def test_level_is_a_named_line() -> None:
    (found,) = on_axes(lambda axes: level(axes, 1.5, "_best")).lines
    assert found.get_label() == "best" and set(found.get_ydata()) == {1.5}


def depth(layout: str) -> tuple[list[str], str]:
    """Tick labels and axis name."""
    chart = Chart(title="x", draw=lambda axes: None, schedule=parse(layout))
    root = ElementTree.fromstring(drawn(chart))
    texts = [e.text or "" for e in root.iter() if e.tag.endswith("text")]
    name = next(text for text in texts if "in order" in text)
    return texts[: texts.index(name)], name


def test_axis_without_a_loop() -> None:
    assert depth("3") == (["0", "1", "2"], "block, in order")
    assert depth("30")[0] == [str(at) for at in range(0, 30, 3)]


def test_loops_are_shaded() -> None:
    assert depth("1 (2)x3 1") == ([str(at) for at in range(8)], "visit, in order (shaded: loop \u00d73)")
    assert depth("(1)x2 1 (1)x4")[1] == "visit, in order (shaded: loop \u00d72 and \u00d74)"


def test_many_visits_are_thinned_out_evenly() -> None:
    slots = shown_visits(parse("2 (2)x40 1"))
    assert len(slots) == MAX_VISITS and (slots[0], slots[-1]) == (0, 82)
    assert len(depth("2 (2)x40 1")[0]) <= 12
