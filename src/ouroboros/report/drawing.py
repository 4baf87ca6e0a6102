"""Draws a chart of the page as one image: an SVG with its own style sheet, light or dark as the reader's screen.

A section draws on matplotlib's axes in the colours of :data:`LIGHT`; the style sheet of the image replaces each of them
by its counterpart of :data:`DARK` where the reader's screen is dark.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ouroboros.errors import OuroborosError
from ouroboros.report.text import displayable
from ouroboros.schedule import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    "page": ("#faf9f6", "#131412"),
    "card": ("#ffffff", "#1c1e1b"),
    "ink": ("#1d1c1a", "#efede6"),
    "soft": ("#5c5953", "#b3afa5"),
    "faint": ("#8d8980", "#86837a"),
    "line": ("#e4e1d9", "#343630"),
    "wash": ("#f2f0ea", "#252722"),
    "arm0": ("#0b7a5f", "#3ecfa4"),
    "arm1": ("#c05a12", "#f2a158"),
    "arm2": ("#5b52c7", "#a49cff"),
    "arm3": ("#a8326e", "#f283b6"),
    "arm4": ("#1f6dbd", "#7db8f5"),
    "arm5": ("#7a6608", "#d6bd4a"),
    "loop0": ("#5fa58f", "#d5eee5"),
    "loop1": ("#3f97a0", "#7fdbd9"),
    "loop2": ("#2f6fab", "#6cb4f2"),
    "loop3": ("#4a47a8", "#9a97ff"),
    "loop4": ("#7a3596", "#cf8bf0"),
    "loop5": ("#a02565", "#ff85b3"),
}
"""Name to the colour on a light and on a dark screen. Light colours are distinct, so that each tells its name."""
LIGHT = {name: light for name, (light, _) in COLORS.items()}
DARK = {name: dark for name, (_, dark) in COLORS.items()}
NUM_ARMS, NUM_LOOPS = 6, 6
"""Colours for arms, of which a further arm starts again at the first, and for loops, from the first to the last."""

SIZE_INCHES = (5.0, 3.3)
"""Small, so that labels stay readable when the chart is scaled to a phone."""
DASHED = (0, (4, 3))
MAX_VISITS = 32
"""More visits would not be told apart on an axis; of more, this many at even distances are shown."""

_STYLE: dict[str, Any] = {
    # Text stays text, in the reader's font; names may hold dollar signs.
    "svg.fonttype": "none",
    "svg.hashsalt": "ouroboros",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 10.5,
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), LIGHT["line"]),
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), LIGHT["soft"]),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left"), False),
    "axes.grid": True,
    "axes.axisbelow": True,
    "text.color": LIGHT["ink"],
    "legend.frameon": False,
    "legend.fontsize": 10,
}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One picture of the page."""

    title: str
    draw: Callable[[Axes], None]
    """Draws it on empty axes; artists with a label appear in the legend."""
    x: str = ""
    y: str = ""
    schedule: Schedule | None = None
    """If given, the horizontal axis is the order of its visits; what a loop repeats is shaded."""
    legend: int = 0
    """Columns of the legend above the drawing; 0 puts it inside, where it hides least."""
    words: str = ""
    """How to read the picture; stands below it."""


def drawn(chart: Chart) -> str:
    """The chart as SVG text; the same chart gives the same text.

    Raises:
        OuroborosError: matplotlib is not installed.
    """
    with styled_figure(*SIZE_INCHES) as figure:
        axes = figure.add_subplot()
        chart.draw(axes)
        axes.set_xlabel(chart.x)
        axes.set_ylabel(chart.y)
        if chart.schedule is not None:
            _depth_axis(axes, chart.schedule)
        if axes.get_legend_handles_labels()[0]:
            above = {"loc": "lower center", "bbox_to_anchor": (0.45, 1.0), "ncols": chart.legend}
            axes.legend(**(above if chart.legend else {"loc": "best"}))
        return themed_svg(figure)


@contextmanager
def styled_figure(width: float, height: float) -> Iterator[Figure]:
    """An empty figure of this size in inches; draw inside the block, and take :func:`themed_svg` there.

    Raises:
        OuroborosError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise OuroborosError("reports need matplotlib: pip install 'ouroboros-lm[report]'") from None
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
        yield Figure(figsize=(width, height), layout="constrained")


def themed_svg(figure: Figure) -> str:
    """``figure`` as SVG text with the style sheet for dark screens."""
    stream = io.StringIO()
    with warnings.catch_warnings():
        # The reader's browser chooses the font, so what this machine's font lacks does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        # Without metadata, which holds the date.
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", metadata=metadata)
    text = stream.getvalue()
    rules = [
        f'[style*="{attribute}: {light}"]{{{attribute}:{dark}!important}}'
        for light, dark in COLORS.values()
        for attribute in ("fill", "stroke")
        if f"{attribute}: {light}" in text
    ]
    font = "text{font-family:system-ui,sans-serif!important}"
    style = f"<style>{font}@media (prefers-color-scheme: dark){{{''.join(rules)}}}</style>"
    return text.replace("<defs>", f"<defs>{style}", 1)


def arm_color(index: int) -> str:
    """The name of the colour of arm ``index`` (from 0)."""
    return f"arm{index % NUM_ARMS}"


def scale_colors(count: int) -> list[str]:
    """``count`` light colours at even distances over the whole scale for loops."""
    return [LIGHT[f"loop{round(i * (NUM_LOOPS - 1) / max(count - 1, 1))}"] for i in range(count)]


def label(name: str) -> str:
    """``name`` as a legend entry: shown even when it begins with an underscore, which matplotlib would hide."""
    return " ".join(displayable(name).split()).lstrip("_") or "unnamed"


def evenly(items: Sequence[Any], limit: int) -> list[Any]:
    """At most ``limit`` items at even distances, the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def level(axes: Axes, value: float, name: str, color: str = "faint") -> None:
    """A broken level line with its name in the legend."""
    axes.axhline(value, color=LIGHT[color], linewidth=1.3, linestyle=DASHED, label=label(name), zorder=1.5)


def heat(
    axes: Axes, values: np.ndarray, extent: tuple[float, float, float, float], color: str | Sequence[str] = "arm0"
) -> None:
    """A heat map: the stronger a value, the less transparent its cell.

    Args:
        axes: to draw on.
        values: in [0, 1], (rows, columns), the lowest row first.
        extent: left, right, lower and upper end.
        color: by name: one for all columns, or one for each.
    """
    # Halfway between the light and the dark colour, because no style sheet reaches pixels.
    codes = [COLORS[name] for name in ([color] if isinstance(color, str) else color)]
    picture = np.empty((*values.shape, 4))
    picture[..., :3] = np.array([[list(bytes.fromhex(code[1:])) for code in pair] for pair in codes]).mean(1) / 255
    picture[..., 3] = np.clip(values, 0, 1)
    axes.imshow(picture, extent=extent, origin="lower", aspect="auto", interpolation="none", zorder=0.6)


def shown_visits(schedule: Schedule) -> list[int]:
    """The visits that an axis over depth shows, at the places 0, 1, 2 and so on."""
    return evenly(range(schedule.num_visits), MAX_VISITS)


def _depth_axis(axes: Axes, schedule: Schedule) -> None:
    """Visits in order as the horizontal axis; what is repeated is shaded."""
    slots = shown_visits(schedule)
    repeated, first = [], 0
    for segment in schedule.segments:
        last = first + segment.num_blocks * segment.loops
        inside = [place for place, slot in enumerate(slots) if first <= slot < last]
        if segment.looped and inside:
            repeated.append(f"\u00d7{segment.loops}")
            axes.axvspan(inside[0] - 0.5, inside[-1] + 0.5, color=LIGHT["wash"], linewidth=0, zorder=-1)
        first = last
    ticks = range(0, len(slots), math.ceil(len(slots) / 12))
    axes.set_xticks(ticks, [str(slots[place]) for place in ticks])
    axes.set_xlim(-0.5, len(slots) - 0.5)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel(f"visit, in order (shaded: loop {' and '.join(repeated)})" if repeated else "block, in order")
