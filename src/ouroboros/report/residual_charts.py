"""Charts of the delta residuals as SVG for the page; see :mod:`ouroboros.report.charts`.

Attention and feed-forward network of a visit stand side by side, attention to the left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ouroboros.report.canvas import Canvas, canvas
from ouroboros.report.delta import BINS, FEATURES, LOW, DeltaFacts, Use
from ouroboros.report.depth import (
    COLORS,
    NAMES,
    Depth,
    cells,
    curve,
    legend_above,
    log_axis,
    matrix_edges,
    spread,
)
from ouroboros.report.palette import LIGHT
from ouroboros.report.series import evenly

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ouroboros.systems.delta.measure import ResidualSummary

MAX_CHANNELS = 6
REGIMES = (("keep", "loop0"), ("erase", "loop2"), ("reflect", "loop5"))
FORCED = ((0.0, "loop0"), (1.0, "loop2"), (2.0, "loop5"))
"""Gate to colour: that of the regime it forces."""
_WIDTH = 0.5
"""Of one use, in visits."""


def _shown(facts: DeltaFacts) -> tuple[Depth, list[tuple[int, Use]]]:
    """The axis, and the uses on it with their numbers."""
    depth = Depth(facts.schedule)
    slots = set(depth.slots)
    return depth, [(index, use) for index, use in enumerate(facts.uses) if use.slot in slots]


def _of(facts: DeltaFacts, sublayer: str) -> tuple[list[Use], list[float]]:
    """The uses of one sublayer and their places."""
    depth, uses = _shown(facts)
    chosen = [use for _, use in uses if use.sublayer == sublayer]
    return chosen, [depth.place(use.slot, sublayer) for use in chosen]


def _histograms(
    drawing: Canvas, facts: DeltaFacts, shares: Callable[[Use], Sequence[float]], low: float, high: float
) -> None:
    """A column for each use, stronger where more tokens are, each scaled to its own fullest part."""
    from matplotlib.patches import Rectangle

    depth, uses = _shown(facts)
    axes = drawing.axes
    columns = [[share / max(shares(use)) for share in shares(use)] for _, use in uses]
    cells(
        axes,
        columns,
        lefts=[depth.place(use.slot, use.sublayer) - _WIDTH / 2 for _, use in uses],
        width=_WIDTH,
        edges=[low + (high - low) * at / BINS for at in range(BINS + 1)],
        color=[COLORS[use.sublayer] for _, use in uses],
    )
    for sublayer, color in COLORS.items():
        axes.add_patch(Rectangle((0, low), 0, 0, facecolor=LIGHT[color], label=NAMES[sublayer]))
    depth.mark(axes)


def _ticks_at(axes: Axes, places: Sequence[float], values: Sequence[float], color: str, name: str, dashes: str) -> None:
    """A short horizontal line at each place."""
    reach = _WIDTH / 2
    left, right = [place - reach for place in places], [place + reach for place in places]
    axes.hlines(values, left, right, color=LIGHT[color], linewidth=1.8, linestyle=dashes, label=name)


def gate_chart(facts: DeltaFacts, *, ident: str = "delta-gate") -> str:
    """Gates of all tokens by depth, with medians now and before training."""
    depth, uses = _shown(facts)
    places = [depth.place(use.slot, use.sublayer) for _, use in uses]
    with canvas(ident) as drawing:
        axes = drawing.axes
        _histograms(drawing, facts, lambda use: use.gates, 0.0, 2.0)
        axes.axhline(1, color=LIGHT["soft"], linewidth=1.0, linestyle=(0, (4, 3)))
        _ticks_at(axes, places, [use.summary.median_beta for _, use in uses], "ink", "median", "-")
        _ticks_at(axes, places, [facts.start_gates[index] for index, _ in uses], "faint", "before training", ":")
        axes.set_ylim(-0.03, 2.03)
        ends = ["0 keep", "0.5", "1 erase", "1.5", "2 reflect"] if facts.erase else ["0", "0.5", "1", "1.5", "2"]
        axes.set_yticks([0, 0.5, 1, 1.5, 2], ends)
        axes.set_ylabel("gate b")
        legend_above(axes, 4)
        return drawing.svg("Gate of each residual by depth, over the tokens of the sample")


def _spread_chart(facts: DeltaFacts, get: Callable[[ResidualSummary], Sequence[float]], drawing: Canvas) -> None:
    for sublayer, color in COLORS.items():
        uses, places = _of(facts, sublayer)
        spread(drawing.axes, places, [get(use.summary) for use in uses], color, NAMES[sublayer])
    Depth(facts.schedule).mark(drawing.axes)
    legend_above(drawing.axes)


def eigenvalue_chart(facts: DeltaFacts, *, ident: str = "delta-eigenvalue") -> str:
    """Quantiles of the eigenvalue along k by depth; empty for the control that does not erase."""
    if not facts.erase:
        return ""
    with canvas(ident) as drawing:
        axes = drawing.axes
        axes.axhspan(-1.05, 0, color=LIGHT["arm3"], alpha=0.07, linewidth=0, zorder=0.5)
        axes.axhline(0, color=LIGHT["soft"], linewidth=1.0, linestyle=(0, (4, 3)))
        _spread_chart(facts, lambda summary: summary.eigenvalue, drawing)
        axes.set_ylim(-1.05, 1.05)
        minus = chr(0x2212)
        axes.set_yticks([-1, -0.5, 0, 0.5, 1], [f"{minus}1 reflect", f"{minus}0.5", "0 erase", "0.5", "1 keep"])
        axes.set_ylabel("eigenvalue along k")
        return drawing.svg("Eigenvalue of the shortcut along its direction by depth")


def regime_chart(facts: DeltaFacts, *, ident: str = "delta-regimes") -> str:
    """Shares of the tokens that keep, erase and reflect, stacked, by depth."""
    depth, uses = _shown(facts)
    places = [depth.place(use.slot, use.sublayer) for _, use in uses]
    with canvas(ident) as drawing:
        axes = drawing.axes
        bottom = [0.0] * len(uses)
        for index, (name, color) in enumerate(REGIMES):
            shares = [100 * use.summary.regimes[index] for _, use in uses]
            axes.bar(places, shares, width=0.44, bottom=bottom, color=LIGHT[color], label=name)
            bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
        depth.mark(axes)
        axes.set_ylim(0, 106)  # above the bars, the shade of a loop is seen
        axes.set_ylabel("% of the tokens")
        legend_above(axes, 3)
        return drawing.svg("Shares of the tokens that each residual keeps, erases and reflects")


def product_chart(facts: DeltaFacts, *, ident: str = "delta-product") -> str:
    """Singular values of the product of the shortcuts by depth, smallest below, and how many are small."""
    if facts.product is None:
        return ""
    depth, uses = _shown(facts)
    rows = min(max(len(facts.product.values[index]) for index, _ in uses), FEATURES)
    # Strong where little is left.
    columns = [[1 - value for value in facts.product.values[index][:rows]] for index, _ in uses]
    places = [depth.place(use.slot, use.sublayer) for _, use in uses]
    with canvas(ident) as drawing:
        axes = drawing.axes
        lefts = [place - _WIDTH / 2 for place in places]
        cells(axes, columns, lefts=lefts, width=_WIDTH, edges=list(range(rows + 1)), color="arm2")
        below = [facts.product.below[index] for index, _ in uses]
        axes.step(places, below, where="mid", color=LIGHT["ink"], linewidth=1.6, label=f"how many are below {LOW:g}")
        depth.mark(axes)
        axes.set_ylim(0, rows)
        axes.set_ylabel("singular values, smallest first")
        ticks = evenly(range(rows + 1), 9)
        axes.set_yticks(ticks, [str(tick) for tick in ticks])
        legend_above(axes, 1)
        return drawing.svg("Singular values of the product of all shortcuts by depth")


def coherence_chart(facts: DeltaFacts, *, signed: bool, ident: str = "delta-coherence") -> str:
    """Products of the directions of all residuals, attention first, then feed-forward."""
    matrix = facts.signed_coherence if signed else facts.coherence
    _, uses = _shown(facts)
    order = [(index, use) for sublayer in NAMES for index, use in uses if use.sublayer == sublayer]
    count = len(order)
    columns = [[matrix[i][j] for j, _ in order] for i, _ in order]
    with canvas(ident) as drawing:
        axes = drawing.axes
        edges = matrix_edges(count)
        cells(axes, columns, lefts=edges[:-1], width=1, edges=edges, color="arm0", negative="arm1")
        for line in (axes.axhline, axes.axvline):
            line(count / 2 - 0.5, color=LIGHT["soft"], linewidth=1.0)
        # A last tick of the first half would touch the first of the second.
        half, step = count // 2, math.ceil(count / 10)
        ticks = [start + at for start in (0, half) for at in range(0, half - (step - 1) // 2, step)]
        names = [str(order[at][1].slot) for at in ticks]
        axes.set_xticks(ticks, names)
        axes.set_yticks(ticks, names)
        axes.set_aspect("equal")
        axes.set_xlim(-0.5, count - 0.5)
        axes.set_ylim(count - 0.5, -0.5)
        axes.grid(visible=False)
        visit = "visit" if facts.schedule.is_looped else "block"
        axes.set_xlabel(f"{visit}: attention | feed-forward")
        axes.set_ylabel("feed-forward | attention")
        return drawing.svg("Products of the directions of all residuals, " + ("with sign" if signed else "absolute"))


def coupling_chart(facts: DeltaFacts, *, ident: str = "delta-coupling") -> str:
    """Which features one token's update mixes; empty without erasing."""
    if facts.coupling is None:
        return ""
    matrix, features = facts.coupling.matrix, facts.coupling.features
    largest = max(abs(value) for row in matrix for value in row) or 1.0
    columns = [[value / largest for value in row] for row in matrix]
    with canvas(ident) as drawing:
        axes = drawing.axes
        edges = matrix_edges(len(features))
        cells(axes, columns, lefts=edges[:-1], width=1, edges=edges, color="arm0", negative="arm1")
        ticks = evenly(range(len(features)), 9)
        axes.set_xticks(ticks, [str(features[at]) for at in ticks])
        axes.set_yticks(ticks, [str(features[at]) for at in ticks])
        axes.set_aspect("equal")
        axes.set_xlim(-0.5, len(features) - 0.5)
        axes.set_ylim(len(features) - 0.5, -0.5)
        axes.grid(visible=False)
        axes.set_xlabel("feature, the strongest first")
        axes.set_ylabel("feature")
        return drawing.svg("Which features one token's update mixes with which")


def _pair_chart(facts: DeltaFacts, pairs: Sequence[tuple[str, str, str]], what: str, ident: str) -> str:
    """Two means by depth for both sublayers; pairs of summary field, name and colour."""
    with canvas(ident) as drawing:
        for field, name, color in pairs:
            for sublayer in NAMES:
                uses, places = _of(facts, sublayer)
                values = [getattr(use.summary, field) for use in uses]
                curve(drawing.axes, places, values, color, sublayer, f"{name}, {NAMES[sublayer]}")
        Depth(facts.schedule).mark(drawing.axes)
        drawing.axes.set_ylim(bottom=0)
        drawing.axes.set_ylabel("mean over tokens")
        legend_above(drawing.axes)
        return drawing.svg(what)


def amount_chart(facts: DeltaFacts, *, ident: str = "delta-amounts") -> str:
    """Amounts erased and written along k by depth."""
    pairs = [("erased", "erased", "arm3"), ("written", "written", "arm2")]
    return _pair_chart(facts, pairs, "Amounts erased and written by depth", ident)


def discrepancy_chart(facts: DeltaFacts, *, ident: str = "delta-discrepancy") -> str:
    """How far the state along k is from its target, before and after each update."""
    pairs = [("discrepancy", "before", "arm3"), ("discrepancy_after", "after", "arm2")]
    return _pair_chart(facts, pairs, "Distance from the target before and after the update by depth", ident)


def norm_chart(facts: DeltaFacts, *, ident: str = "delta-norm") -> str:
    """Length of the state after every residual, and before training."""
    depth, uses = _shown(facts)
    places = [depth.place(use.slot, use.sublayer) for _, use in uses]
    with canvas(ident) as drawing:
        axes = drawing.axes
        values = [use.summary.state_norm_after for _, use in uses]
        axes.plot(places, values, color=LIGHT["arm2"], linewidth=1.8, marker="o", markersize=4, label="this model")
        start = [facts.start_norms[index] for index, _ in uses]
        dashes = (0, (4, 3))
        axes.plot(places, start, color=LIGHT["faint"], linewidth=1.5, linestyle=dashes, label="before training")
        depth.mark(axes)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("|X|, mean over tokens")
        legend_above(axes)
        return drawing.svg("Length of the state by depth")


def target_chart(facts: DeltaFacts, *, ident: str = "delta-targets") -> str:
    """Targets of all tokens by depth; empty for a constant."""
    if facts.target_range is None:
        return ""
    low, high = facts.target_range
    with canvas(ident) as drawing:
        _histograms(drawing, facts, lambda use: use.targets, low, high)
        drawing.axes.set_ylim(low, high)
        drawing.axes.set_ylabel("target v")
        legend_above(drawing.axes)
        return drawing.svg("Targets of each residual by depth, over the tokens of the sample")


def output_chart(facts: DeltaFacts, *, ident: str = "delta-outputs") -> str:
    """Quantiles of the length of each sublayer's output by depth."""
    with canvas(ident) as drawing:
        axes = drawing.axes
        floor = facts.eps  # an output of exactly 0 has no place on a logarithmic axis
        _spread_chart(facts, lambda summary: [max(value, floor) for value in summary.h_norm], drawing)
        ends = [max(use.summary.h_norm[at], floor) for use in facts.uses for at in (0, -1)]
        log_axis(axes, 0.95 * min(ends), 1.05 * max(ends))
        axes.set_ylabel("|h|")
        return drawing.svg("Length of each sublayer's output by depth")


def channel_chart(facts: DeltaFacts, *, ident: str = "delta-channels") -> str:
    """Length of each value channel by depth; empty with one channel."""
    count = len(facts.uses[0].channel_norms)
    if count < 2:
        return ""
    depth, uses = _shown(facts)
    places = [depth.place(use.slot, use.sublayer) for _, use in uses]
    with canvas(ident) as drawing:
        axes = drawing.axes
        shown = evenly(range(count), MAX_CHANNELS)
        for index, channel in enumerate(shown):
            color = LIGHT[f"loop{round(index * (MAX_CHANNELS - 1) / (len(shown) - 1))}"]
            values = [use.channel_norms[channel] for _, use in uses]
            axes.plot(places, values, color=color, linewidth=1.7, marker="o", markersize=3.5, label=f"{channel}")
        depth.mark(axes)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("length, mean over tokens")
        axes.legend(title="channel", loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=MAX_CHANNELS)
        return drawing.svg("Length of each value channel by depth")


def cosine_chart(facts: DeltaFacts, *, ident: str = "delta-cosines") -> str:
    """Cosine between value channels by depth: the range over pairs, and the mean."""
    depth, uses = _shown(facts)
    found = [(depth.place(use.slot, use.sublayer), use.cosines) for _, use in uses if use.cosines is not None]
    if not found:
        return ""
    places = [place for place, _ in found]
    low, mean, high = zip(*(cosines for _, cosines in found), strict=True)
    with canvas(ident) as drawing:
        axes = drawing.axes
        axes.fill_between(places, low, high, color=LIGHT["arm2"], alpha=0.2, linewidth=0, label="range over pairs")
        axes.plot(places, mean, color=LIGHT["arm2"], linewidth=1.8, marker="o", markersize=4, label="mean")
        depth.mark(axes)
        axes.set_ylim(min(0.0, *low) - 0.03, 1.03)
        axes.set_ylabel("cosine of two channels")
        legend_above(axes)
        return drawing.svg("Cosine between the value channels by depth")


def reading_chart(facts: DeltaFacts, *, filtered: bool, ident: str = "delta-reading") -> str:
    """How each compressor weighs the value channels: its read vector, or with the filter; empty with one channel."""
    if not facts.readings:
        return ""
    shown = evenly(facts.readings, 12)
    rows = [reading.weights if filtered else reading.read for reading in shown]
    largest = max(abs(value) for row in rows for value in row) or 1.0
    count = len(rows[0])
    columns = [[row[channel] / largest for row in rows] for channel in range(count)]
    with canvas(ident) as drawing:
        axes = drawing.axes
        across, down = matrix_edges(count), matrix_edges(len(rows))
        cells(axes, columns, lefts=across[:-1], width=1, edges=down, color="arm0", negative="arm1")
        for y, row in enumerate(rows):
            for x, value in enumerate(row if count <= 8 else ()):
                text = f"{value:.2f}".replace("-", chr(0x2212))
                strong = abs(value) > 0.55 * largest
                style = {"ha": "center", "va": "center", "fontsize": 8.5}
                axes.text(x, y, text, color=LIGHT["card" if strong else "ink"], **style)
        axes.set_xticks(evenly(range(count), 12))
        axes.set_yticks(range(len(rows)), [reading.name for reading in shown])
        axes.set_xlim(-0.5, count - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False)
        axes.set_xlabel("value channel")
        return drawing.svg("Weights of the value channels in " + ("the reading" if filtered else "the read vectors"))


def ablation_chart(facts: DeltaFacts, sublayer: str, *, ident: str) -> str:
    """Change of the loss when the gate of one use is forced, with 95 % intervals; empty if it was not measured."""
    depth = Depth(facts.schedule)
    slots = set(depth.slots)
    found = [one for one in facts.ablations if one.sublayer == sublayer and one.slot in slots]
    if not found:
        return ""
    with canvas(ident) as drawing:
        axes = drawing.axes
        for index, (beta, color) in enumerate(FORCED):
            chosen = [one for one in found if one.beta == beta]
            places = [depth.place(one.slot) + (index - 1) * 0.27 for one in chosen]
            changes = [one.change for one in chosen]
            axes.bar(places, changes, width=0.24, color=LIGHT[color], label=f"b = {beta:g}")
            for place, one in zip(places, chosen, strict=True):
                if one.stderr is not None:
                    low, high = one.change - 1.96 * one.stderr, one.change + 1.96 * one.stderr
                    axes.vlines(place, low, high, color=LIGHT["faint"], linewidth=1.4)
        axes.axhline(0, color=LIGHT["soft"], linewidth=1.0)
        reach = [1.96 * (one.stderr or 0.0) for one in found]
        ends = [one.change + side * far for one, far in zip(found, reach, strict=True) for side in (-1, 1)]
        _change_axis(axes, min(ends), max(ends))
        depth.mark(axes)
        axes.set_ylabel("loss change, nats per token")
        legend_above(axes, 3)
        return drawing.svg(f"Change of the loss when one gate of {NAMES[sublayer]} is forced")


def _change_axis(axes: Axes, low: float, high: float) -> None:
    """A vertical axis for changes of any size and sign: linear to 0.01, then logarithmic."""
    low, high = min(1.3 * low, -0.003), max(1.3 * high, 0.012)
    axes.set_yscale("symlog", linthresh=0.01, linscale=0.5)
    axes.set_ylim(low, high)
    rising = [step * 10.0**power for power in (-2, -1, 0, 1) for step in (1, 3)]
    ticks = [tick for tick in (*(-value for value in rising[::2]), 0.0, *rising) if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:+g}".replace("-", chr(0x2212)) if tick else "0" for tick in ticks])
    axes.minorticks_off()
