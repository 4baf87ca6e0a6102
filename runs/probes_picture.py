"""The picture of `memory_probes.py`: quality against state bytes, one panel per task, as one SVG of its own."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from ouroboros.report.canvas import SIZE_INCHES, canvas
from ouroboros.report.palette import DARK, LIGHT, arm_color, css_variables, var

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {
    "recall": "Recall of 4, 8 and 16 pairs",
    "copy": "Copy of 8, 16 and 32 tokens",
    "needle": "A needle in 16, 64 and 256 tokens",
    "text": "Text, trained on 256 bytes alone",
}
MARKERS = "osD^"
GLYPHS = (0x25CF, 0x25A0, 0x25C6, 0x25B2)
"""Of the markers, for the legend."""
TICKS = {1e3: "1 kB", 1e4: "10 kB", 1e5: "100 kB", 1e6: "1 MB"}
WIDTH, HEIGHT = (72 * inches for inches in SIZE_INCHES)
"""Of a panel, points."""
MARGIN, TITLE, HEAD = 14, 20, 92


def draw(record: dict[str, Any]) -> str:
    """The whole picture: a legend above two rows of panels; light or dark as the reader's screen."""
    rates = record["tokens_per_second"]
    width = 2 * WIDTH + 3 * MARGIN
    rows = -(-len(record["tasks"]) // 2)
    height = HEAD + rows * (HEIGHT + TITLE + MARGIN) + 8
    parts = legend(rates)
    for index, (name, task) in enumerate(record["tasks"].items()):
        x = MARGIN + index % 2 * (WIDTH + MARGIN)
        y = HEAD + index // 2 * (HEIGHT + TITLE + MARGIN)
        parts.append(text(TITLES[name], x + 4, y + 13, "ink", size=14, weight=600))
        place = f'<svg x="{x:g}" y="{y + TITLE:g}" width="{WIDTH:g}" height="{HEIGHT:g}" '
        parts.append(panel(name, task, rates).replace("<svg ", place, 1))
    style = f":root{{{css_variables(LIGHT)}}}@media (prefers-color-scheme: dark){{:root{{{css_variables(DARK)}}}}}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="Quality against state bytes" '
        f'font-family="system-ui, sans-serif"><style>{style}</style>'
        f'<rect width="100%" height="100%" style="fill: {var("card")}"/>{"".join(parts)}</svg>\n'
    )


def panel(name: str, task: dict[str, Any], rates: dict[str, float]) -> str:
    """One task: every arm a line through the scored lengths."""
    is_text = name == "text"
    with canvas(f"probe-{name}") as drawing:
        axes = drawing.axes
        if not is_text:
            levels(axes, task)
        for index, (arm, found) in enumerate(task["arms"].items()):
            color, sizes = LIGHT[arm_color(index)], found["state_bytes"]
            means = [one["mean"] for one in found["intervals"]]
            axes.plot(sizes, means, color=color, linewidth=1.4)
            for size, one in zip(sizes, found["intervals"], strict=True):
                if one["low"] is not None:
                    low = one["low"] if is_text else max(one["low"], 0.0)
                    axes.vlines(size, low, one["high"] if is_text else min(one["high"], 1.0), color=color, alpha=0.35)
            axes.scatter(
                sizes,
                means,
                s=area(rates[arm], rates),
                marker=MARKERS[index],
                color=color,
                edgecolor=LIGHT["card"],
                zorder=3,
            )
            for words, size, mean in joined(task["lengths"], sizes, means, near=0.15 if is_text else 0.06):
                # Two arms have the same state: one is labelled on its right, one on its left.
                side, place = ("left", (8, -3)) if index < 3 else ("right", (-8, -3))
                at = {"textcoords": "offset points", "xytext": place, "fontsize": 8.5, "color": color, "ha": side}
                axes.annotate(words, (size, mean), **at)
        axes.set_xscale("log", base=10)
        axes.set_xlim(7e2, 1.5e6)
        axes.set_xticks(list(TICKS), list(TICKS.values()))
        axes.minorticks_off()
        axes.set_xlabel("state of one sequence")
        if is_text:
            axes.invert_yaxis()
            axes.set_ylabel("bits per byte (better upwards)")
        else:
            axes.set_ylim(-0.06, 1.05)
            axes.set_ylabel("accuracy")
        return drawing.svg(f"{TITLES[name]}: quality against state bytes")


def joined(lengths: list[int], sizes: list[int], means: list[float], near: float) -> list[tuple[str, int, float]]:
    """Labels and their places: lengths whose markers lie on each other share one."""
    found: list[tuple[str, int, float]] = []
    for length, size, mean in zip(lengths, sizes, means, strict=True):
        same = [at for at, (_, other, height) in enumerate(found) if other == size and abs(height - mean) < near]
        if same:
            words, _, height = found[same[0]]
            found[same[0]] = (f"{words}, {length}", size, height)
        else:
            found.append((str(length), size, mean))
    return found


def levels(axes: Axes, task: dict[str, Any]) -> None:
    """What can be guessed, at the trained length."""
    for level, dashes, side in (("chance", (0, (1, 2)), "top"), ("unbound", (0, (4, 3)), "bottom")):
        value = task["levels"][0][level]
        axes.axhline(value, color=LIGHT["faint"], linewidth=1.2, linestyle=dashes)
        axes.annotate(level, (1.4e6, value), ha="right", va=side, fontsize=8.5, color=LIGHT["faint"])


def area(rate: float, rates: dict[str, float]) -> float:
    """Of a marker, square points: it grows with the square root of the tokens per second, so that all can be seen."""
    return 110 * (rate / max(rates.values())) ** 0.5


def legend(rates: dict[str, float]) -> list[str]:
    """Arms, and what length, size and lines mean."""
    parts = [text("Quality against what a sequence's memory costs", MARGIN, 24, "ink", size=17, weight=700)]
    x = float(MARGIN)
    for index, (arm, rate) in enumerate(rates.items()):
        words = f"{arm}, {rate:,.0f}/s"
        parts.append(
            text(chr(GLYPHS[index]), x, 50, arm_color(index), size=round(20 * (rate / max(rates.values())) ** 0.25))
        )
        parts.append(text(words, x + 19, 50, "ink", size=12))
        x += 34 + 6.4 * len(words)
    notes = "At the markers: tokens of the scored sequences. Larger markers: more tokens decoded per second."
    parts.append(text(notes, MARGIN, 72, "soft", size=12))
    return parts


def text(words: str, x: float, y: float, color: str, *, size: int, weight: int = 400) -> str:
    """One line."""
    style = f"font-size: {size}px; font-weight: {weight}; fill: {var(color)}"
    return f'<text x="{x:g}" y="{y:g}" style="{style}">{escape(words)}</text>'
