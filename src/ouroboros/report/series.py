"""Metrics records to the points of a curve: chosen, smoothed and thinned out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ouroboros.report.text import finite

Points = tuple[list[float], list[float]]
"""Abscissae and ordinates."""
MAX_POINTS = 300
"""A page stays small however long the run was."""


def points(records: Iterable[Mapping[str, Any]], kind: str, x: str, y: str) -> Points:
    """The finite pairs ``(record[x], record[y])`` of the records of ``kind``, in order."""
    xs: list[float] = []
    ys: list[float] = []
    for record in records:
        if record.get("kind") != kind:
            continue
        left, right = finite(record.get(x)), finite(record.get(y))
        if left is not None and right is not None:
            xs.append(left)
            ys.append(right)
    return xs, ys


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

    Returns an empty list when no train record has ``key``.
    """
    known, values = points(records, "train", "step", key)
    if not known:
        return []
    out = []
    position = 0
    for step in steps:
        while position < len(known) and known[position] < step:
            position += 1
        if position == 0:
            # Step 0 is where everything begins, whatever the first logged step is.
            left, below = 0.0, 0.0
        else:
            left, below = known[position - 1], values[position - 1]
        if position == len(known):
            out.append(values[-1])
            continue
        right, above = known[position], values[position]
        out.append(above if right == left else below + (above - below) * (step - left) / (right - left))
    return out


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
        step = finite(record.get("step"))
        loops = record.get("loops")
        if record.get("kind") != "telemetry" or step is None or not isinstance(loops, Sequence):
            continue
        for entry in loops:
            value = finite(entry.get(key))
            if value is not None:
                xs, ys = found.setdefault((int(entry.get("segment", 0)), int(entry.get("loop", 0))), ([], []))
                xs.append(step)
                ys.append(value)
    return dict(sorted(found.items()))


def evenly(items: Sequence[Any], limit: int) -> list[Any]:
    """At most ``limit`` items at even distances, the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]
