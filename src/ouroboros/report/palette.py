"""Colours of the page and its charts, for light and dark screens, under one name each.

A chart refers to ``var(--name, #light)``: on the page it follows the reader's colour scheme, alone it is light.
"""

from __future__ import annotations

LIGHT = {
    "page": "#faf9f6",
    "card": "#ffffff",
    "ink": "#1d1c1a",
    "soft": "#5c5953",
    "faint": "#8d8980",
    "line": "#e4e1d9",
    "wash": "#f2f0ea",
    "arm0": "#0b7a5f",
    "arm1": "#c05a12",
    "arm2": "#5b52c7",
    "arm3": "#a8326e",
    "loop0": "#5fa58f",
    "loop1": "#3f97a0",
    "loop2": "#2f6fab",
    "loop3": "#4a47a8",
    "loop4": "#7a3596",
    "loop5": "#a02565",
}
"""Name to ``#rrggbb``; every value is distinct, so that a colour in a drawn chart tells its name."""

DARK = {
    "page": "#131412",
    "card": "#1c1e1b",
    "ink": "#efede6",
    "soft": "#b3afa5",
    "faint": "#86837a",
    "line": "#343630",
    "wash": "#252722",
    "arm0": "#3ecfa4",
    "arm1": "#f2a158",
    "arm2": "#a49cff",
    "arm3": "#f283b6",
    "loop0": "#d5eee5",
    "loop1": "#7fdbd9",
    "loop2": "#6cb4f2",
    "loop3": "#9a97ff",
    "loop4": "#cf8bf0",
    "loop5": "#ff85b3",
}

NUM_ARMS = sum(name.startswith("arm") for name in LIGHT)
"""Colours for arms; a further arm starts again at the first."""
NUM_LOOPS = sum(name.startswith("loop") for name in LIGHT)
"""Colours for loops, from the first loop to the last."""

_NAMES = {value: name for name, value in LIGHT.items()}


def arm_color(index: int) -> str:
    """The name of the colour of arm ``index`` (from 0)."""
    return f"arm{index % NUM_ARMS}"


def var(name: str) -> str:
    """The CSS value of colour ``name``, with the light one as fallback."""
    return f"var(--{name}, {LIGHT[name]})"


def name_of(value: str) -> str | None:
    """The name of a light colour ``#rrggbb`` in any case, or None."""
    return _NAMES.get(value.lower())


def css_variables(colors: dict[str, str]) -> str:
    """CSS declarations of custom properties, one for each colour."""
    return " ".join(f"--{name}: {value};" for name, value in colors.items())
