"""Charts as SVG for the page: matplotlib figures without global state, deterministic, text as text.

Every function returns an ``<svg>`` element, or ``""`` when there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ouroboros.report.canvas import canvas, label
from ouroboros.report.content import Arm, LoopPoint, Row
from ouroboros.report.palette import LIGHT, NUM_LOOPS, arm_color
from ouroboros.report.series import at_steps, evenly, loop_series, points, smoothed, target_bits, thinned
from ouroboros.report.text import bits, finite, tick

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TELEMETRY = {
    "update_ratio": "Update ratio: how far a loop moves the state",
    "cosine": "Cosine of a loop's update with the one before",
    "state_norm": "State norm (RMS) after a loop",
    "grad_norm": "Gradient norm after a loop",
}
"""Telemetry key to what it shows, in the order of the page."""

_DASHES = ("-", (0, (5, 1.5)), (0, (2, 1.2)), "-.")


def loss_chart(arms: Sequence[Arm], *, reference: Row | None = None, ident: str = "loss") -> str:
    """Bits per byte of training (smoothed, and each record faintly) and of validation (marked) over training tokens.

    Args:
        arms: their ``metrics`` are drawn, and their ``target_loss`` as a level line; an arm without any metrics is
            passed over.
        reference: a score drawn as a level line, for example the best baseline.
        ident: unique on the page.
    """
    with_tokens = any(points(arm.metrics, "train", "tokens", "bits_per_byte")[0] for arm in arms)
    x_key = "tokens" if with_tokens else "step"
    drawn = [(i, a) for i, a in enumerate(arms) if points(a.metrics, "train", x_key, "bits_per_byte")[0]]
    if not drawn:
        return ""
    with canvas(ident) as drawing:
        axes = drawing.axes
        ceilings, floors, has_target = [], [], False
        for index, arm in drawn:
            high, low = _draw_loss(axes, index, arm, x_key)
            ceilings.append(high)
            floors.append(low)
            if (target := target_bits(arm.metrics, arm.target_loss)) is not None:
                name = f"target: {arm.target_loss:g} nats/token, {bits(target)} bits/byte"
                _level(axes, target, name, LIGHT["ink"])
                floors.append(target)
                ceilings.append(target)
                has_target = True
        if reference is not None:
            _level(axes, reference.bits_per_byte, reference.name)
            floors.append(reference.bits_per_byte)
            ceilings.append(reference.bits_per_byte)
        top, bottom = max(ceilings), min(floors)
        margin = 0.06 * (top - bottom) or 0.1
        axes.set_ylim(bottom - margin, top + margin)
        axes.set_xlim(left=0)
        axes.set_xlabel("training tokens" if with_tokens else "step")
        axes.set_ylabel("bits per byte")
        axes.xaxis.set_major_formatter(lambda value, _: tick(value))
        # Curves fall, so the upper right is free, unless a distant target presses them together there.
        axes.legend(loc="best" if has_target else "upper right")
        return drawing.svg("Bits per byte in training and validation over training " + x_key)


def _draw_loss(axes: Axes, index: int, arm: Arm, x_key: str) -> tuple[float, float]:
    """Draw one arm; returns the range worth seeing: past the first steep fall, down to the lowest value."""
    color, dashes = LIGHT[arm_color(index)], _DASHES[index % len(_DASHES)]
    xs, ys = points(arm.metrics, "train", x_key, "bits_per_byte")
    mean = smoothed(ys, len(ys) / 50)
    axes.plot(*thinned(xs, ys), color=color, linewidth=0.8, alpha=0.22)
    axes.plot(*thinned(xs, mean), color=color, linewidth=1.9, linestyle=dashes, label=f"{label(arm.name)}, training")
    steps, scores = points(arm.metrics, "valid", "step", "bits_per_byte")
    places = at_steps(arm.metrics, steps, "tokens") if x_key == "tokens" else steps
    if places and scores:
        style = {"marker": "o" if index % 2 == 0 else "s", "markersize": 4.5, "linewidth": 0.9}
        axes.plot(*thinned(places, scores, 60), color=color, **style, label=f"{label(arm.name)}, validation")
    settled = mean[len(mean) // 8 :]
    return max(settled), min([*mean, *scores])


def loop_chart(curves: Mapping[str, Sequence[LoopPoint]], arms: Sequence[Arm] = (), *, ident: str = "loops") -> str:
    """Bits per byte against loop count, with intervals; the trained count is ringed.

    Args:
        curves: points by arm name.
        arms: give the colours by their order; one without a curve but with a score is drawn as a level line.
        ident: unique on the page.
    """
    shown = {n: sorted(p, key=lambda point: point.loops) for n, p in curves.items()}
    shown = {n: [p for p in curve if finite(p.bits_per_byte) is not None] for n, curve in shown.items()}
    shown = {n: curve for n, curve in shown.items() if curve}
    if not shown:
        return ""
    order = [arm.name for arm in arms]
    with canvas(ident) as drawing:
        axes = drawing.axes
        for name, curve in shown.items():
            index = order.index(name) if name in order else len(order)
            _draw_loops(axes, index, name, curve, annotate=len(shown) == 1 and len(curve) <= 10)
        for index, arm in enumerate(arms):
            if arm.name not in shown and finite(arm.bits_per_byte) is not None:
                _level(axes, arm.bits_per_byte, f"{arm.name}, no loop", LIGHT[arm_color(index)])
        counts = sorted({point.loops for curve in shown.values() for point in curve})
        if counts[-1] >= 8 * counts[0]:
            axes.set_xscale("log", base=2)
            axes.minorticks_off()
        axes.set_xticks(evenly(counts, 10), [str(count) for count in evenly(counts, 10)])
        axes.margins(x=0.1, y=0.16)
        axes.set_xlabel("loops at test time")
        axes.set_ylabel("bits per byte")
        axes.legend(loc="best")
        return drawing.svg("Bits per byte against the number of loops at test time")


def _draw_loops(axes: Axes, index: int, name: str, curve: Sequence[LoopPoint], *, annotate: bool) -> None:
    color = LIGHT[arm_color(index)]
    xs, ys = [p.loops for p in curve], [p.bits_per_byte for p in curve]
    axes.plot(xs, ys, color=color, linewidth=1.8, marker="o", markersize=4.5, label=label(name))
    for point in curve:
        if point.low is not None and point.high is not None:
            axes.vlines(point.loops, point.low, point.high, color=color, linewidth=4, alpha=0.35)
    if annotate:
        _write_values(axes, curve)
    trained = [p for p in curve if p.trained]
    if trained:
        ring = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "markeredgewidth": 1.6, "linestyle": "none"}
        places = [p.loops for p in trained], [p.bits_per_byte for p in trained]
        axes.plot(*places, color=LIGHT["ink"], **ring, label="loops in training")


def _write_values(axes: Axes, curve: Sequence[LoopPoint]) -> None:
    """Each point's value on the side where the curve leaves room: it mostly falls to a minimum and rises again."""
    scores = [point.bits_per_byte for point in curve]
    for i, point in enumerate(curve):
        falls = i + 1 < len(curve) and scores[i + 1] < scores[i]
        rose = i > 0 and scores[i - 1] < scores[i]
        if falls:
            place, side = (6, 5), "left"
        elif rose and i + 1 < len(curve):
            place, side = (6, -12), "left"
        else:
            place, side = (0, -18), "center"
        style = {"textcoords": "offset points", "fontsize": 9.5, "color": LIGHT["soft"]}
        axes.annotate(bits(scores[i]), (point.loops, scores[i]), xytext=place, ha=side, **style)


def telemetry_chart(records: Sequence[Mapping[str, Any]], key: str, *, ident: str) -> str:
    """One quantity of :data:`TELEMETRY` over training steps, a line for each loop.

    Args:
        records: metrics records; those of kind ``telemetry`` are used.
        key: the quantity.
        ident: unique on the page.
    """
    series = loop_series(records, key)
    if not series:
        return ""
    segments = sorted({segment for segment, _ in series})
    # From the norms, which every loop has: a loop keeps its colour on the charts where the first is missing.
    known = sorted({loop for _, loop in loop_series(records, "state_norm") or series})
    colors = _loop_colors(evenly(known, NUM_LOOPS))
    with canvas(ident) as drawing:
        axes = drawing.axes
        for segment in segments:
            for loop in [loop for where, loop in series if where == segment and loop in colors]:
                name = f"loop {loop + 1}" if len(segments) == 1 else f"part {segment + 1}, loop {loop + 1}"
                color = colors[loop]
                style = _DASHES[segments.index(segment) % len(_DASHES)]
                xs, ys = thinned(*series[segment, loop])
                marker = "o" if len(xs) == 1 else None
                axes.plot(xs, ys, color=color, linewidth=1.8, linestyle=style, marker=marker, label=name)
        axes.set_xlabel("step")
        axes.xaxis.set_major_formatter(lambda value, _: tick(value))
        axes.margins(y=0.12)
        if len(axes.lines) <= 3:
            axes.legend(loc="best")
        else:  # many lines fill the chart, so their names go above it
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
        return drawing.svg(TELEMETRY.get(key, key))


def _loop_colors(loops: Sequence[int]) -> dict[int, str]:
    """Distinct colours over the whole scale, from the first loop to the last."""
    return {loop: LIGHT[f"loop{round(i * (NUM_LOOPS - 1) / max(len(loops) - 1, 1))}"] for i, loop in enumerate(loops)}


def _level(axes: Axes, value: float | None, name: str, color: str = LIGHT["faint"]) -> None:
    """A level line with its name in the legend."""
    if value is not None:
        axes.axhline(value, color=color, linewidth=1.3, linestyle=(0, (4, 3)), label=label(name), zorder=1.5)
