"""The charts of a run's metrics: learning curves, the score by loop count, and the telemetry of the loops."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ouroboros.report.content import Arm, Report, Section
from ouroboros.report.drawing import LIGHT, NUM_LOOPS, Chart, arm_color, evenly, label, level, scale_colors
from ouroboros.report.text import finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TELEMETRY = {
    "update_ratio": ("Update ratio: how far a loop moves the state", "length of the update / of the state"),
    "cosine": ("Cosine of a loop's update with the one before", "cosine"),
    "state_norm": ("State norm (RMS) after a loop", "root mean square of the state"),
    "grad_norm": ("Gradient norm after a loop", "norm of the gradient"),
}
"""Telemetry key to the title of its chart and the name of its axis, in the order of the page."""
MAX_POINTS = 300
"""Of a curve, so that the page stays small however long the run was."""
_FEW = 3
"""Arms of which a chart has room for a line and a legend for all that is drawn."""
_DASHES = ("-", (0, (5, 1.5)), (0, (2, 1.2)), "-.")

Points = tuple[list[float], list[float]]
"""Abscissae and ordinates."""


def curves(report: Report) -> Section | None:
    """The learning curves of all arms, and their scores by loop count."""
    charts = []
    if any(points(arm.metrics, "train", "step", "bits_per_byte")[0] for arm in report.arms):
        draw = partial(_draw_losses, report=report)
        few = sum(bool(arm.metrics) for arm in report.arms) <= _FEW
        legend, words = (0, "") if few else (3, "Lines: training, smoothed. Marks: validation.")
        charts.append(
            Chart(
                title="Bits per byte during training",
                draw=draw,
                x="step",
                y="bits per byte",
                legend=legend,
                words=words,
            )
        )
    if any(report.loop_curve.values()):
        title, draw = "Bits per byte against loop count, same weights", partial(_draw_loop_counts, report=report)
        charts.append(Chart(title=title, draw=draw, x="loops at test time", y="bits per byte"))
    return Section(ident="curves", title="Learning and looping", charts=charts) if charts else None


def telemetry(arm: Arm, ident: str) -> Section | None:
    """What the loops of one arm did over its training; None without telemetry."""
    charts = [
        Chart(title=title, draw=partial(_draw_loops, records=arm.metrics, key=key), x="step", y=name, legend=3)
        for key, (title, name) in TELEMETRY.items()
        if loop_series(arm.metrics, key)
    ]
    return Section(ident=ident, title=f"Inside the loops of {arm.name}", charts=charts) if charts else None


def _draw_losses(axes: Axes, *, report: Report) -> None:
    """Training smoothed, and each record faintly; validation marked; the best baseline as a level line."""
    seen: list[float] = []
    few = sum(bool(arm.metrics) for arm in report.arms) <= _FEW
    for index, arm in enumerate(report.arms):
        color, dashes, name = LIGHT[arm_color(index)], _DASHES[index % len(_DASHES)], label(arm.name)
        xs, ys = points(arm.metrics, "train", "step", "bits_per_byte")
        if not xs:
            continue
        mean = smoothed(ys, len(ys) / 50)
        if few:
            axes.plot(*thinned(xs, ys), color=color, linewidth=0.8, alpha=0.22)
        line = f"{name}, training" if few else name
        axes.plot(*thinned(xs, mean), color=color, linewidth=1.9, linestyle=dashes, label=line)
        steps, scores = points(arm.metrics, "valid", "step", "bits_per_byte")
        if steps:
            style: dict[str, Any] = {"marker": "o" if index % 2 == 0 else "s", "markersize": 4.5, "linewidth": 0.9}
            style |= {"label": f"{name}, validation"} if few else {"linewidth": 0}
            axes.plot(*thinned(steps, scores, 60), color=color, **style)
        # What is worth seeing: past the first steep fall, down to the lowest value.
        seen += [max(mean[len(mean) // 8 :]), min([*mean, *scores])]
    if baseline := next((row for row in report.rows if row.arm is None), None):
        level(axes, baseline.bits_per_byte, baseline.name)
        seen.append(baseline.bits_per_byte)
    margin = 0.06 * (max(seen) - min(seen)) or 0.1
    axes.set_ylim(min(seen) - margin, max(seen) + margin)
    axes.set_xlim(left=0)


def _draw_loop_counts(axes: Axes, *, report: Report) -> None:
    """Curves with intervals, the trained count ringed; an arm without a curve but with a score is a level line."""
    order, drawn = [arm.name for arm in report.arms], set[int]()
    for name, curve in report.loop_curve.items():
        color = LIGHT[arm_color(order.index(name) if name in order else len(order))]
        drawn |= {point.loops for point in curve}
        places, scores = [p.loops for p in curve], [p.bits_per_byte for p in curve]
        axes.plot(places, scores, color=color, linewidth=1.8, marker="o", markersize=4.5, label=label(name))
        for point in curve:
            if point.low is not None and point.high is not None:
                axes.vlines(point.loops, point.low, point.high, color=color, linewidth=4, alpha=0.35)
        if trained := [(p.loops, p.bits_per_byte) for p in curve if p.trained]:
            ring = {"markersize": 11, "markerfacecolor": "none", "markeredgewidth": 1.6, "color": LIGHT["ink"]}
            axes.plot(*zip(*trained, strict=True), "o", **ring, label="loops in training")
    for index, arm in enumerate(report.arms):
        score = finite(arm.bits_per_byte)
        if arm.name not in report.loop_curve and score is not None:
            level(axes, score, f"{arm.name}, no loop", arm_color(index))
    counts = sorted(drawn)
    if counts[-1] >= 8 * counts[0]:
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
    axes.set_xticks(evenly(counts, 10), [str(count) for count in evenly(counts, 10)])
    axes.margins(x=0.1, y=0.16)


def _draw_loops(axes: Axes, *, records: Sequence[Mapping[str, Any]], key: str) -> None:
    """One quantity of :data:`TELEMETRY` over the training steps, a line for each loop."""
    series = loop_series(records, key)
    segments = sorted({segment for segment, _ in series})
    # Of the norms, which every loop has: a loop keeps its colour on the charts where the first is missing.
    known = evenly(sorted({loop for _, loop in loop_series(records, "state_norm") or series}), NUM_LOOPS)
    colors = dict(zip(known, scale_colors(len(known)), strict=True))
    for (segment, loop), line in series.items():
        if loop in colors:
            name = f"loop {loop + 1}" if len(segments) == 1 else f"part {segment + 1}, loop {loop + 1}"
            style = _DASHES[segments.index(segment) % len(_DASHES)]
            marker = "." if len(line[0]) == 1 else ""
            axes.plot(*thinned(*line), color=colors[loop], linestyle=style, marker=marker, label=name)
    axes.margins(y=0.12)


def points(records: Iterable[Mapping[str, Any]], kind: str, x: str, y: str) -> Points:
    """The finite pairs ``(record[x], record[y])`` of the records of ``kind``, in order."""
    pairs = [(finite(one.get(x)), finite(one.get(y))) for one in records if one.get("kind") == kind]
    found = [(left, right) for left, right in pairs if left is not None and right is not None]
    return [left for left, _ in found], [right for _, right in found]


def smoothed(values: Sequence[float], span: float) -> list[float]:
    """Exponential moving average over about ``span`` values, with the bias of the start removed (Adam, eq. 3)."""
    decay = math.exp(-1.0 / max(span, 1e-9))
    out: list[float] = []
    mean, weight = 0.0, 0.0
    for value in values:
        mean = decay * mean + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        out.append(mean / weight)
    return out


def thinned(xs: Sequence[float], ys: Sequence[float], limit: int = MAX_POINTS) -> Points:
    """At most ``limit`` points at even distances, the first and the last among them."""
    return evenly(xs, limit), evenly(ys, limit)


def loop_series(records: Iterable[Mapping[str, Any]], key: str) -> dict[tuple[int, int], Points]:
    """``key`` of every loop over the training steps, by ``(segment, loop)`` in order."""
    found: dict[tuple[int, int], Points] = {}
    for record in records:
        step, loops = finite(record.get("step")), record.get("loops")
        if record.get("kind") != "telemetry" or step is None or not isinstance(loops, Sequence):
            continue
        for entry in loops:
            if (value := finite(entry.get(key))) is not None:
                xs, ys = found.setdefault((int(entry.get("segment", 0)), int(entry.get("loop", 0))), ([], []))
                xs.append(step)
                ys.append(value)
    return dict(sorted(found.items()))
