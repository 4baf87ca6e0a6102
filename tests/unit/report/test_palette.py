from __future__ import annotations

import re

import pytest

from ouroboros.report.palette import DARK, LIGHT, NUM_ARMS, arm_color, css_variables, name_of, var


def luminance(value: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    channels = [int(value[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_both_schemes_have_the_same_names_and_distinct_values() -> None:
    assert LIGHT.keys() == DARK.keys()
    for colors in (LIGHT, DARK):
        assert all(re.fullmatch(r"#[0-9a-f]{6}", value) for value in colors.values())
        assert len(set(colors.values())) == len(colors)


@pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_lines_are_legible(colors: dict[str, str]) -> None:
    for name in ("ink", "soft"):
        assert min(contrast(colors[name], colors[back]) for back in ("card", "page", "wash")) >= 4.5, name
    for name in colors:
        if name.startswith(("arm", "loop")):
            assert contrast(colors[name], colors["card"]) >= (4 if name.startswith("arm") else 2.8), name


def test_names_round_trip() -> None:
    assert var("ink") == f"var(--ink, {LIGHT['ink']})"
    assert name_of(LIGHT["arm1"].upper()) == "arm1"
    assert name_of("#123456") is None
    assert arm_color(NUM_ARMS) == arm_color(0) == "arm0"
    assert css_variables({"a": "#000000", "b": "#111111"}) == "--a: #000000; --b: #111111;"
