"""The schedule as a picture: a box for each block, a return arrow for each loop, the visits in order."""

from __future__ import annotations

from html import escape

from ouroboros.schedule import Schedule, Segment, parse

BOX, GAP, PAD = 30, 8, 6
TOP = 42
"""Upper edge of the boxes; loops return above it."""
CELL = 20
SHOWN_BLOCKS = 6
"""A longer segment is drawn as its first two blocks, an ellipsis and its last."""
SHOWN_VISITS = 48


def schedule_svg(layout: str, *, color: str = "arm0") -> str:
    """Draw a layout as SVG of its natural size in pixels.

    Args:
        layout: schedule notation, for example ``"2 (2)x3 2"``.
        color: palette name of the colour of looped blocks.

    Raises:
        OuroborosError: the notation is wrong.
    """
    schedule = parse(layout)
    parts = [_text("tokens", 0, TOP + BOX / 2 + 4, "soft", anchor="start")]
    x = 44.0
    for segment in schedule.segments:
        pad = PAD if segment.looped else 0
        parts.append(_line(x, x + GAP))
        x += GAP
        drawn, width = _segment(segment, x, color)
        parts += drawn
        x += width + pad * 2
    parts += [_line(x, x + GAP), _text("logits", x + GAP + 4, TOP + BOX / 2 + 4, "soft", anchor="start")]
    width = max(x + GAP + 42, 300)
    visits, height = _visits(schedule, TOP + BOX + 34, width, color)
    blocks, count = schedule.num_blocks, schedule.num_visits
    label = f"layout {schedule.notation}: {blocks} stored blocks, {count} visits"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="schedule" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{"".join(parts + visits)}</svg>'
    )


def _segment(segment: Segment, x: float, color: str) -> tuple[list[str], float]:
    """The boxes of a segment from ``x`` on, and their width without padding."""
    names = [str(block) for block in segment.blocks]
    if len(names) > SHOWN_BLOCKS:
        names = [*names[:2], "", names[-1]]
    width = len(names) * BOX + (len(names) - 1) * GAP
    parts = []
    if segment.looped:
        style = f"fill: var(--{color}); fill-opacity: 0.12"
        parts.append(_rect(x, TOP - PAD, width + 2 * PAD, BOX + 2 * PAD, 9, style))
        parts += _return_arrow(x + PAD, x + PAD + width, segment.loops, color)
        x += PAD
    for index, name in enumerate(names):
        left = x + index * (BOX + GAP)
        if index:
            parts.append(_line(left - GAP, left))
        if name:
            parts += _box(left, name, color if segment.looped else None)
        else:
            parts.append(_text(chr(0x2026), left + BOX / 2, TOP + BOX / 2 + 3, "soft"))
    return parts, width


def _box(left: float, name: str, color: str | None) -> list[str]:
    fill = f"fill: var(--{color})" if color else "fill: var(--card); stroke: var(--faint); stroke-width: 1.2"
    text = _text(name, left + BOX / 2, TOP + BOX / 2 + 4, "card" if color else "ink", weight=600)
    return [_rect(left, TOP, BOX, BOX, 6, fill), text]


def _return_arrow(left: float, right: float, loops: int, color: str) -> list[str]:
    """From above the last box back to above the first, with the loop count on it."""
    start, end = right - BOX / 2 + 5, left + BOX / 2 - 5
    top, foot = 20, TOP - PAD - 3
    path = (
        f"M {start:g} {TOP - PAD} L {start:g} {top + 8} Q {start:g} {top} {start - 8:g} {top} "
        f"L {end + 8:g} {top} Q {end:g} {top} {end:g} {top + 8} L {end:g} {foot - 3}"
    )
    head = f"M {end - 4:g} {foot - 4} L {end + 4:g} {foot - 4} L {end:g} {foot + 3} z"
    return [
        f'<path d="{path}" style="fill: none; stroke: var(--{color}); stroke-width: 1.8"/>',
        f'<path d="{head}" style="fill: var(--{color})"/>',
        _text(f"{chr(0xD7)}{loops}", (start + end) / 2, top - 6, color, weight=700),
    ]


def _visits(schedule: Schedule, top: float, width: float, color: str) -> tuple[list[str], float]:
    """The strip of visits in order, and the lower edge of the drawing."""
    looped = {block for segment in schedule.segments if segment.looped for block in segment.blocks}
    count = f"{schedule.num_visits} visits" if schedule.num_visits > 1 else "1 visit"
    stored = f"{schedule.num_blocks} stored block{'s' * (schedule.num_blocks > 1)}"
    parts = [_text(f"{stored}, {count} in order:", 0, top, "soft", anchor="start")]
    per_row = int(width // CELL)
    for index, visit in enumerate(schedule.visits[:SHOWN_VISITS]):
        x, y = index % per_row * CELL, top + 10 + index // per_row * CELL
        if visit.block in looped:
            # Later loops are stronger, so that the repetition is seen.
            share = (visit.loop + 1) / max(s.loops for s in schedule.segments if visit.block in s.blocks)
            style = f"fill: var(--{color}); fill-opacity: {0.14 + 0.30 * share:.2f}"
        else:
            style = "fill: var(--wash)"
        parts.append(_rect(x, y, CELL - 2, CELL - 2, 4, style))
        parts.append(_text(str(visit.block), x + CELL / 2 - 1, y + CELL / 2 + 3, "ink", size=10))
    bottom = top + 10 + CELL * -(-min(schedule.num_visits, SHOWN_VISITS) // per_row)
    if schedule.num_visits > SHOWN_VISITS:
        bottom += 18
        parts.append(_text(f"and {schedule.num_visits - SHOWN_VISITS} more", 0, bottom - 6, "soft", anchor="start"))
    return parts, bottom


def _rect(x: float, y: float, width: float, height: float, radius: float, style: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" style="{style}"/>'


def _line(start: float, end: float) -> str:
    y = TOP + BOX / 2
    return f'<path d="M {start:g} {y:g} L {end:g} {y:g}" style="stroke: var(--faint); stroke-width: 1.2"/>'


def _text(
    text: str, x: float, y: float, color: str, *, anchor: str = "middle", weight: int = 400, size: int = 12
) -> str:
    style = f"font-size: {size}px; font-weight: {weight}; text-anchor: {anchor}; fill: var(--{color})"
    return f'<text x="{x:g}" y="{y:g}" style="{style}">{escape(text)}</text>'
