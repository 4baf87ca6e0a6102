"""Renders a report as one HTML file that needs nothing but itself."""

from __future__ import annotations

import logging
import math
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouroboros.errors import OuroborosError
from ouroboros.files import replacing
from ouroboros.report.content import Report, Row, Sample
from ouroboros.report.curves import curves, telemetry
from ouroboros.report.drawing import DARK, LIGHT, arm_color, drawn
from ouroboros.report.text import bits, displayable, plural, quantity, signed_bits
from ouroboros.schedule import Schedule, parse

if TYPE_CHECKING:
    from jinja2 import Environment

logger = logging.getLogger(__name__)

MAX_SAMPLE = 4_000
"""Characters of a sample that are shown."""
SHOWN_VISITS = 48
"""Of a model's schedule."""
MAX_PAGE_BYTES = 1_000_000
"""A page is meant to be sent to a friend; a larger one is reported in the log."""


def render(report: Report, out: Path | str) -> None:
    """Write ``report`` as one HTML file without references to anything outside it; the same report, the same bytes.

    The file is written beside its place and renamed, so it is either the old one or complete.

    Raises:
        OuroborosError: matplotlib or jinja2 is missing, a layout is wrong, or the file cannot be written.
    """
    path, data = Path(out), to_html(report).encode("utf-8")
    if len(data) > MAX_PAGE_BYTES:
        size = quantity(len(data), "B")
        logger.warning("%s: the page has %s, more than the 1 MB it is meant to stay under", out, size)
    if path.is_dir():
        raise OuroborosError(f"{path} is a directory; give a file name such as {path / 'report.html'}")
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise OuroborosError(f"{path}: cannot write the report: {error.strerror or error}") from None


def to_html(report: Report) -> str:
    """The page of ``report`` as text; see :func:`render`."""
    template = _environment().from_string(_resource("template.html.j2"))
    rows = report.rows
    loops = [telemetry(arm, f"loops-{index}") for index, arm in enumerate(report.arms)]
    return template.render(
        report=report,
        rows=rows,
        axis=axis(rows) if len(rows) > 1 else None,
        tone=_tone(report),
        style=_resource("style.css"),
        light=LIGHT,
        dark=DARK,
        schedules=[parse(arm.layout) if arm.layout else None for arm in report.arms],
        sections=[section for section in (curves(report), *loops, *report.sections) if section is not None],
        samples=[_cut(sample) for sample in report.samples],
        recipes=[(arm.name, arm.recipe) for arm in report.arms if arm.recipe],
    )


def shown_visits(schedule: Schedule) -> list[tuple[int, float]]:
    """The block of each of the first :data:`SHOWN_VISITS` visits, and which share of its loops has then begun; 0 where
    there is no loop."""
    loops = {block: segment.loops for segment in schedule.segments if segment.looped for block in segment.blocks}
    shown = schedule.visits[:SHOWN_VISITS]
    return [(one.block, (one.loop + 1) / loops[one.block] if one.block in loops else 0.0) for one in shown]


def axis(rows: list[Row]) -> dict[str, Any]:
    """The common axis of the rows' dots: ``low``, ``high`` and ``ticks`` in bits per byte, at round numbers."""
    lows = [row.bits_per_byte if row.low is None else row.low for row in rows]
    highs = [row.bits_per_byte if row.high is None else row.high for row in rows]
    span = max(max(highs) - min(lows), 1e-3)
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= span / 5)
    first, last = math.floor(min(lows) / step - 0.2), math.ceil(max(highs) / step + 0.2)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    ticks = [round(i * step, digits) for i in range(first, last + 1)]
    return {"low": ticks[0], "high": ticks[-1], "ticks": ticks, "digits": digits}


def _environment() -> Environment:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError:
        raise OuroborosError("reports need jinja2: pip install 'ouroboros-lm[report]'") from None
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_finalize
    )
    environment.filters.update(
        bits=bits,
        signed=signed_bits,
        quantity=quantity,
        plural=plural,
        color=arm_color,
        drawn=drawn,
        typeset=_typeset,
        visits=shown_visits,
    )
    return environment


def _finalize(value: Any) -> Any:
    """Every text that reaches the page is cleaned; markup of our own has ``__html__`` and passes."""
    if isinstance(value, (str, bytes)) and not hasattr(value, "__html__"):
        return displayable(value)
    return value


def _typeset(words: str) -> str:
    """Prose of our own, with every percentage on one line."""
    return words.replace(" %", chr(0xA0) + "%")


def _tone(report: Report) -> str:
    """How the headline is coloured: by the winner, or not."""
    if report.difference is None:
        return "plain"
    if not report.decided:
        return "even"
    return {"better": "arm0", "worse": "arm1"}.get(report.difference.verdict, "even")


def _cut(sample: Sample) -> dict[str, Any]:
    text, prompt = displayable(sample.text), displayable(sample.prompt)
    return {
        "prompt": prompt[-MAX_SAMPLE:],
        "text": text[:MAX_SAMPLE],
        "cut": max(0, len(text) - MAX_SAMPLE),
        "arm": sample.arm,
        "settings": sample.settings,
    }


def _resource(name: str) -> str:
    return resources.files("ouroboros.report").joinpath(name).read_text(encoding="utf-8")
