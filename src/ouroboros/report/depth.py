"""Charts over depth: the order of visits as horizontal axis, loops marked, and the shapes drawn along it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ouroboros.report.palette import LIGHT
from ouroboros.report.series import evenly
from ouroboros.schedule import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_VISITS = 32
"""More would not be told apart; of more, this many at even distances are shown."""
MAX_MARKED_LOOPS = 8
LEVELS = 12
"""Shades of a heat map: each is one shape in the SVG, however many cells it has."""
COLORS = {"mixer": "arm0", "mlp": "arm1"}
"""Sublayer to its colour on every chart."""
NAMES = {"mixer": "attention", "mlp": "feed-forward"}
OFFSETS = {"mixer": -0.25, "mlp": 0.25}
"""Within its visit, the mixer stands to the left."""


@dataclass(frozen=True)
class Depth:
    """The horizontal axis: visits in order, both sublayers of a visit side by side."""

    schedule: Schedule

    @property
    def slots(self) -> list[int]:
        """The visits shown."""
        return evenly(range(self.schedule.num_visits), MAX_VISITS)

    def place(self, slot: int, sublayer: str | None = None) -> float:
        """Where a use, or a whole visit, that is shown stands."""
        return self.slots.index(slot) + (OFFSETS[sublayer] if sublayer else 0.0)

    def mark(self, axes: Axes) -> None:
        """Scale and name the axis, and shade what is repeated, with a line where a loop begins again."""
        slots = self.slots
        where = {slot: index for index, slot in enumerate(slots)}
        repeated, first = [], 0
        for segment in self.schedule.segments:
            last = first + segment.num_blocks * segment.loops
            inside = [where[slot] for slot in slots if first <= slot < last]
            if segment.looped and inside:
                repeated.append(segment.loops)
                axes.axvspan(inside[0] - 0.5, inside[-1] + 0.5, color=LIGHT["wash"], linewidth=0, zorder=0)
                starts = range(first + segment.num_blocks, last, segment.num_blocks)
                # More lines would cut the picture to pieces.
                if segment.loops <= MAX_MARKED_LOOPS:
                    for start in [slot for slot in starts if slot in where]:
                        axes.axvline(where[start] - 0.5, color=LIGHT["faint"], linewidth=0.8, linestyle=(0, (2, 2)))
            first = last
        ticks = slots[:: math.ceil(len(slots) / 12)]
        axes.set_xticks([where[slot] for slot in ticks], [str(slot) for slot in ticks])
        axes.set_xlim(-0.5, len(slots) - 0.5)
        axes.grid(visible=False, axis="x")
        times = " and ".join(f"{chr(0xD7)}{loops}" for loops in repeated)
        axes.set_xlabel(f"visit, in order (shaded: loop {times})" if repeated else "block, in order")


def cells(
    axes: Axes,
    columns: Sequence[Sequence[float]],
    *,
    lefts: Sequence[float],
    width: float,
    edges: Sequence[float],
    color: str | Sequence[str],
    negative: str | None = None,
) -> None:
    """A heat map: the stronger a value, the less transparent its cell, which reads on light and dark pages alike.

    Args:
        axes: to draw on.
        columns: values in [-1, 1], from the lowest row up; a column may be short.
        lefts: left edge of each column.
        width: of a column.
        edges: of the rows, one more than the longest column has.
        color: palette name, for all columns or for each.
        negative: palette name for values below 0, which otherwise stay empty.
    """
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    shapes: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for index, column in enumerate(columns):
        own = color if isinstance(color, str) else color[index]
        levels = [round(LEVELS * min(max(value, -1.0), 1.0)) for value in column]
        start = 0
        for row in range(1, len(levels) + 1):
            if row < len(levels) and levels[row] == levels[start]:
                continue  # equal neighbours are one rectangle
            name = own if levels[start] > 0 else negative
            if levels[start] and name is not None:
                left, right, low, high = lefts[index], lefts[index] + width, edges[start], edges[row]
                corners = [(left, low), (right, low), (right, high), (left, high), (left, low)]
                shapes.setdefault((name, abs(levels[start])), []).extend(corners)
            start = row
    for (name, level), points in sorted(shapes.items()):
        codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * (len(points) // 5)
        style = {"facecolor": LIGHT[name], "alpha": level / LEVELS, "linewidth": 0}
        axes.add_patch(PathPatch(Path(points, codes), **style))


def spread(axes: Axes, places: Sequence[float], quantiles: Sequence[Sequence[float]], color: str, name: str) -> None:
    """Five quantiles at each place: a thin line from the first to the last, a thick one, and a dot in the middle."""
    low, lower, middle, upper, high = zip(*quantiles, strict=True)
    size = min(1.0, 16 / len(places))
    axes.vlines(places, low, high, color=LIGHT[color], linewidth=0.7 + 0.5 * size, alpha=0.6)
    axes.vlines(places, lower, upper, color=LIGHT[color], linewidth=4 * size, alpha=0.5)
    dots = {"marker": "o", "markersize": 2 + 2.5 * size, "linestyle": "none"}
    axes.plot(places, middle, color=LIGHT[color], label=name, **dots)


def curve(axes: Axes, places: Sequence[float], values: Sequence[float], color: str, sublayer: str, name: str) -> None:
    """One quantity of one sublayer by depth: attention solid with dots, feed-forward dashed with squares."""
    first = sublayer == "mixer"
    style = {"marker": "o" if first else "s", "markersize": 4, "linestyle": "-" if first else (0, (4, 2))}
    axes.plot(places, values, color=LIGHT[color], linewidth=1.5, label=name, **style)


def legend_above(axes: Axes, columns: int = 2) -> None:
    """The legend above the drawing, where nothing is hidden by it."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=columns, columnspacing=1.2, handlelength=1.4)


def matrix_edges(count: int) -> list[float]:
    """Edges of ``count`` rows around whole numbers."""
    return [at - 0.5 for at in range(count + 1)]


def log_axis(axes: Axes, low: float, high: float) -> None:
    """A logarithmic vertical axis around ``low`` to ``high``, from one round number to another."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) <= 4 else (1,)
    ticks = [step * 10.0**power for power in powers for step in steps]
    first = max(tick for tick in ticks if tick <= low)
    last = min(tick for tick in ticks if tick >= high)
    shown = evenly([tick for tick in ticks if first <= tick <= last], 8)
    axes.set_yscale("log")
    axes.set_ylim(first, last)
    axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
    axes.minorticks_off()
