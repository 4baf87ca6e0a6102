"""Renders a report as one HTML file that needs nothing but itself."""

from __future__ import annotations

import logging
import math
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouroboros.errors import OuroborosError
from ouroboros.files import replacing
from ouroboros.report.bars import heaviest, length_chart, share_chart
from ouroboros.report.charts import TELEMETRY, loop_chart, loss_chart, telemetry_chart
from ouroboros.report.content import Report, Row, Sample
from ouroboros.report.drawing import schedule_svg
from ouroboros.report.palette import DARK, LIGHT, arm_color, css_variables
from ouroboros.report.pictures import lead, pictures, table
from ouroboros.report.text import bits, displayable, percent, plural, quantity, signed_bits

if TYPE_CHECKING:
    from jinja2 import Environment

logger = logging.getLogger(__name__)

MAX_SAMPLE = 4_000
"""Characters of a sample that are shown."""
MAX_PAGE_BYTES = 1_000_000
"""A page is meant to be sent to a friend; a larger one is reported in the log."""


def render(report: Report, out: Path | str) -> None:
    """Write ``report`` as one HTML file without references to anything outside it; the same report, the same bytes.

    The file is written beside its place and renamed, so it is either the old one or complete.

    Raises:
        OuroborosError: matplotlib or jinja2 is missing, a layout is wrong, or the file cannot be written.
    """
    data = to_html(report).encode("utf-8")
    if len(data) > MAX_PAGE_BYTES:
        logger.warning(
            "%s: the page has %s, more than the 1 MB it is meant to stay under", out, quantity(len(data), "B")
        )
    _write(Path(out), data)


def to_html(report: Report) -> str:
    """The page of ``report`` as text; see :func:`render`."""
    environment = _environment()
    template = environment.from_string(_resource("template.html.j2"))
    rows = report.rows
    return template.render(
        report=report,
        rows=rows,
        axis=axis(rows) if len(rows) > 1 else None,
        tone=_tone(report),
        style=_resource("style.css") + (_resource("delta.css") if report.delta else ""),
        light=css_variables(LIGHT),
        dark=css_variables(DARK),
        drawings=[schedule_svg(a.layout, color=arm_color(i)) if a.layout else "" for i, a in enumerate(report.arms)],
        loss=loss_chart(report.arms, reference=next((r for r in rows if r.arm is None), None)),
        loops=loop_chart(report.loop_curve, report.arms),
        telemetry=_telemetry(report),
        shares=share_chart(report.data.sources) if report.data else "",
        lengths=_lengths(report),
        delta=_delta(report),
        samples=[_cut(sample) for sample in report.samples],
        recipes=[(arm.name, arm.recipe) for arm in report.arms if arm.recipe],
    )


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
        bits=bits, signed=signed_bits, quantity=quantity, color=arm_color, percent=percent, plural=plural
    )
    return environment


def _finalize(value: Any) -> Any:
    """Every text that reaches the page is cleaned; markup of our own has ``__html__`` and passes."""
    if isinstance(value, (str, bytes)) and not hasattr(value, "__html__"):
        return displayable(value)
    return value


def _tone(report: Report) -> str:
    """How the headline is coloured: by the winner, or not."""
    if report.difference is None:
        return "plain"
    if not report.decided:
        return "even"
    return {"better": "arm0", "worse": "arm1"}.get(report.difference.verdict, "even")


def _telemetry(report: Report) -> list[dict[str, Any]]:
    """For each arm with telemetry its charts, as pairs of title and SVG."""
    found = []
    for index, arm in enumerate(report.arms):
        charts = [
            (title, svg)
            for key, title in TELEMETRY.items()
            if (svg := telemetry_chart(arm.metrics, key, ident=f"telemetry{index}-{key.replace('_', '-')}"))
        ]
        if charts:
            found.append({"name": arm.name, "charts": charts})
    return found


def _lengths(report: Report) -> list[dict[str, Any]]:
    """For each source whose documents' lengths are known the source and its chart."""
    sources = heaviest(report.data.sources) if report.data else []
    found = [
        {"source": source, "svg": length_chart(source.lengths, ident=f"lengths{index}")}
        for index, source in enumerate(sources)
        if source.lengths is not None
    ]
    return [entry for entry in found if entry["svg"]]


def _delta(report: Report) -> dict[str, Any] | None:
    """The words, pictures and numbers of the delta residuals."""
    facts = report.delta
    if facts is None:
        return None
    return {"headline": facts.headline, "lead": lead(facts), "pictures": pictures(facts), "rows": table(facts)}


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


def _write(path: Path, data: bytes) -> None:
    """Write a file completely or not at all."""
    if path.is_dir():
        raise OuroborosError(f"{path} is a directory; give a file name such as {path / 'report.html'}")
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise OuroborosError(f"{path}: cannot write the report: {error.strerror or error}") from None
