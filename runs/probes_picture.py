"""The picture of `memory_probes.py`: quality against state bytes, one panel per task, as one SVG of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ouroboros.report.drawing import DASHED, LIGHT, arm_color, styled_figure, themed_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {
    "recall": "Recall of 4, 8 and 16 pairs",
    "copy": "Copy of 8, 16 and 32 tokens",
    "needle": "A needle in 16, 64 and 256 tokens",
    "text": "Text, trained on 256 bytes alone",
}
MARKERS = "osD^"
TICKS = {1e3: "1 kB", 1e4: "10 kB", 1e5: "100 kB", 1e6: "1 MB"}
NOTES = "At the markers: tokens of the scored sequences. Larger markers: more tokens decoded per second."


def draw(record: dict[str, Any]) -> str:
    """The whole picture: two rows of panels above a legend; light or dark as the reader's screen."""
    rates = record["tokens_per_second"]
    rows = -(-len(record["tasks"]) // 2)
    with styled_figure(10.4, 3.7 * rows + 1.0) as figure:
        figure.set_facecolor(LIGHT["card"])
        figure.suptitle(f"Quality against what a sequence's memory costs\n{NOTES}", x=0.01, ha="left", fontsize=12)
        panels = figure.subplots(rows, 2, squeeze=False).flatten()
        for axes, (name, task) in zip(panels, record["tasks"].items(), strict=False):
            panel(axes, name, task, rates)
        for axes in panels[len(record["tasks"]) :]:
            axes.set_axis_off()
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=len(rates))
        return themed_svg(figure)


def panel(axes: Axes, name: str, task: dict[str, Any], rates: dict[str, float]) -> None:
    """One task: every arm a line through the scored lengths."""
    is_text = name == "text"
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
        style = {"marker": MARKERS[index], "color": color, "edgecolor": LIGHT["card"], "zorder": 3}
        axes.scatter(sizes, means, s=area(rates[arm], rates), label=f"{arm}, {rates[arm]:,.0f}/s", **style)
        for words, size, mean in joined(task["lengths"], sizes, means, near=0.15 if is_text else 0.06):
            # Two arms have the same state: one is labelled on its right, one on its left.
            side, place = ("left", (8, -3)) if index < 3 else ("right", (-8, -3))
            at = {"textcoords": "offset points", "xytext": place, "fontsize": 8.5, "color": color, "ha": side}
            axes.annotate(words, (size, mean), **at)
    axes.set_title(TITLES[name], loc="left", fontsize=11)
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
    for level, dashes, side in (("chance", (0, (1, 2)), "top"), ("unbound", DASHED, "bottom")):
        value = task["levels"][0][level]
        axes.axhline(value, color=LIGHT["faint"], linewidth=1.2, linestyle=dashes)
        axes.annotate(level, (1.4e6, value), ha="right", va=side, fontsize=8.5, color=LIGHT["faint"])


def area(rate: float, rates: dict[str, float]) -> float:
    """Of a marker, square points: it grows with the square root of the tokens per second, so that all can be seen."""
    return 110 * (rate / max(rates.values())) ** 0.5
