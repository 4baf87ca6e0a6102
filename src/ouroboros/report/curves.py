"""The charts of a run's metrics: learning curves, the score by loop count, and the telemetry of the loops."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ouroboros.report.content import Arm, LoopPoint, Report, Section
from ouroboros.report.drawing import LIGHT, NUM_LOOPS, Chart, arm_color, evenly, label, level, scale_colors
from ouroboros.report.text import bits, finite, tick

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
_DASHES = ("-", (0, (5, 1.5)), (0, (2, 1.2)), "-.")

Points = tuple[list[float], list[float]]
"""Abscissae and ordinates."""


def curves(report: Report) -> Section | None:
    """The learning curves of all arms, and their scores by loop count."""
    baseline = next((row for row in report.rows if row.arm is None), None)
    x = "tokens" if any(points(arm.metrics, "train", "tokens", "bits_per_byte")[0] for arm in report.arms) else "step"
    trained = [i for i, arm in enumerate(report.arms) if points(arm.metrics, "train", x, "bits_per_byte")[0]]
    looped = {name: _scored(curve) for name, curve in report.loop_curve.items() if _scored(curve)}
    loss = Chart(
        title="Bits per byte during training",
        draw=partial(_draw_losses, arms=report.arms, chosen=trained, baseline=baseline, x_key=x),
        x="training tokens" if x == "tokens" else "step",
        y="bits per byte",
    )
    loops = Chart(
        title="Bits per byte against loop count, same weights",
        draw=partial(_draw_loop_counts, curves=looped, arms=report.arms),
        x="loops at test time",
        y="bits per byte",
    )
    if not trained and not looped:
        return None
    title = "Learning and looping" if trained and looped else "Learning" if trained else "Looping"
    return Section(ident="curves", title=title, charts=[loss] * bool(trained) + [loops] * bool(looped))


def telemetry(arm: Arm, ident: str) -> Section | None:
    """What the loops of one arm did over its training; None without telemetry."""
    charts = [
        Chart(
            title=title,
            draw=partial(_draw_loops, records=arm.metrics, key=key),
            x="step",
            y=name,
        )
        for key, (title, name) in TELEMETRY.items()
        if loop_series(arm.metrics, key)
    ]
    return Section(ident=ident, title=f"Inside the loops of {arm.name}", charts=charts) if charts else None


def _draw_losses(axes: Axes, *, arms: Sequence[Arm], chosen: Sequence[int], baseline: Any, x_key: str) -> None:
    """Training smoothed, and each record faintly; validation marked; targets and the best baseline as level lines."""
    seen: list[float] = []
    for index in chosen:
        seen += _draw_loss(axes, index, arms[index], x_key)
        target = target_bits(arms[index].metrics, arms[index].target_loss)
        if target is not None:
            name = f"target: {arms[index].target_loss:g} nats/token, {bits(target)} bits/byte"
            level(axes, target, name, "ink")
            seen.append(target)
    if baseline is not None:
        level(axes, baseline.bits_per_byte, baseline.name)
        seen.append(baseline.bits_per_byte)
    margin = 0.06 * (max(seen) - min(seen)) or 0.1
    axes.set_ylim(min(seen) - margin, max(seen) + margin)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: tick(value))


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
    return max(mean[len(mean) // 8 :]), min([*mean, *scores])


def _scored(curve: Sequence[LoopPoint]) -> list[LoopPoint]:
    """The points with a finite score, by loop count."""
    return sorted((p for p in curve if finite(p.bits_per_byte) is not None), key=lambda point: point.loops)


def _draw_loop_counts(axes: Axes, *, curves: Mapping[str, Sequence[LoopPoint]], arms: Sequence[Arm]) -> None:
    """Curves with intervals, the trained count ringed; an arm without a curve but with a score is a level line."""
    order = [arm.name for arm in arms]
    for name, curve in curves.items():
        color = LIGHT[arm_color(order.index(name) if name in order else len(order))]
        places, scores = [p.loops for p in curve], [p.bits_per_byte for p in curve]
        axes.plot(places, scores, color=color, linewidth=1.8, marker="o", markersize=4.5, label=label(name))
        for point in curve:
            if point.low is not None and point.high is not None:
                axes.vlines(point.loops, point.low, point.high, color=color, linewidth=4, alpha=0.35)
        if len(curves) == 1 and len(curve) <= 10:
            _write_values(axes, curve)
        if trained := [(p.loops, p.bits_per_byte) for p in curve if p.trained]:
            ring = {"markersize": 11, "markerfacecolor": "none", "markeredgewidth": 1.6, "color": LIGHT["ink"]}
            axes.plot(*zip(*trained, strict=True), "o", **ring, label="loops in training")
    for index, arm in enumerate(arms):
        if arm.name not in curves and arm.bits_per_byte is not None and finite(arm.bits_per_byte) is not None:
            level(axes, arm.bits_per_byte, f"{arm.name}, no loop", arm_color(index))
    counts = sorted({point.loops for curve in curves.values() for point in curve})
    if counts[-1] >= 8 * counts[0]:
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
    axes.set_xticks(evenly(counts, 10), [str(count) for count in evenly(counts, 10)])
    axes.margins(x=0.1, y=0.16)


def _write_values(axes: Axes, curve: Sequence[LoopPoint]) -> None:
    """Each point's value on the side where the curve leaves room: above while it falls, else below."""
    for point, after in zip(curve, [*curve[1:], None], strict=True):
        falls = after is not None and after.bits_per_byte < point.bits_per_byte
        place, side = ((6, 5), "left") if falls else ((0, -18), "center")
        style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9.5, "color": LIGHT["soft"], "ha": side}
        axes.annotate(bits(point.bits_per_byte), (point.loops, point.bits_per_byte), xytext=place, **style)


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
            xs, ys = thinned(*line)
            marker = "o" if len(xs) == 1 else None
            axes.plot(xs, ys, color=colors[loop], linewidth=1.8, linestyle=style, marker=marker, label=name)
    axes.xaxis.set_major_formatter(lambda value, _: tick(value))
    axes.margins(y=0.12)
    if len(axes.lines) > 3:  # many lines fill the chart, so their names go above it
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)


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


def at_steps(records: Sequence[Mapping[str, Any]], steps: Sequence[float], key: str) -> list[float]:
    """``key`` of the train records, interpolated at ``steps``: where a validation lies on the token axis.

    Step 0 is where everything begins, whatever the first logged step is. The list is empty when no train record has
    ``key``.
    """
    known, values = points(records, "train", "step", key)
    return np.interp(steps, [0.0, *known], [0.0, *values]).tolist() if known else []


def target_bits(records: Iterable[Mapping[str, Any]], nats: float | None) -> float | None:
    """Nats per token as bits per byte of the validation text, by its records in both units; None without such."""
    per_token, per_byte = points(records, "valid", "nats_per_token", "bits_per_byte")
    # The sample is fixed, so every record has the same ratio.
    known = [bits / each for each, bits in zip(per_token, per_byte, strict=True) if each > 0]
    return None if nats is None or not known else nats * known[-1]


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
