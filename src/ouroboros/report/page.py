"""Renders a report as one file that needs nothing but itself: an HTML page, or its words and numbers as Markdown."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouroboros.errors import OuroborosError, check
from ouroboros.files import write_whole
from ouroboros.report.content import Report, Row
from ouroboros.report.curves import curves, telemetry
from ouroboros.report.drawing import DARK, LIGHT, Chart, arm_color, drawn
from ouroboros.report.markdown import to_markdown
from ouroboros.report.text import bits, displayable, plural, quantity
from ouroboros.schedule import parse

if TYPE_CHECKING:
    from jinja2 import Environment

MAX_SAMPLE = 4_000
"""Characters of a sample that are shown."""


def render(report: Report, out: Path | str) -> None:
    """Write ``report`` as one file without references to anything outside it; the same report, the same bytes.

    A name that ends in ``.md`` gives Markdown, any other one HTML. Afterwards the file is whole, or as it was.

    Raises:
        OuroborosError: matplotlib or jinja2 is missing, a layout is wrong, or the file cannot be written.
    """
    path = Path(out)
    check(not path.is_dir(), f"{path} is a directory; give a file name such as {path / 'report.html'}")
    text = to_markdown(report) if path.suffix.lower() == ".md" else to_html(report)
    write_whole(path, text.encode("utf-8"))


def to_html(report: Report) -> str:
    """The page of ``report`` as text; see :func:`render`."""
    tone = "plain"
    if report.difference is not None:  # the headline is coloured by the winner
        winner = {"better": "arm0", "worse": "arm1"}.get(report.difference.verdict, "even")
        tone = winner if report.decided else "even"
    loops = [telemetry(arm, f"loops-{index}") for index, arm in enumerate(report.arms)]
    return (
        _environment()
        .get_template("template.html.j2")
        .render(
            report=report,
            tone=tone,
            light=LIGHT,
            dark=DARK,
            schedules=[parse(arm.layout) if arm.layout else None for arm in report.arms],
            sections=[section for section in (curves(report), *loops, *report.sections) if section is not None],
            samples=[(one, displayable(one.prompt), displayable(one.text)) for one in report.samples],
            max_sample=MAX_SAMPLE,
            recipes=[(arm.name, arm.recipe) for arm in report.arms if arm.recipe],
        )
    )


def axis(rows: Sequence[Row]) -> dict[str, Any]:
    """The common axis of the rows' dots: ``low``, ``high`` and ``ticks`` in bits per byte, at round numbers."""
    from matplotlib.ticker import MaxNLocator

    lows = [row.bits_per_byte if row.low is None else row.low for row in rows]
    highs = [row.bits_per_byte if row.high is None else row.high for row in rows]
    ticks = [*map(float, MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(min(lows), max(highs) + 1e-3))]
    digits = max(0, math.ceil(-math.log10(ticks[1] - ticks[0]) - 1e-9))
    return {"low": ticks[0], "high": ticks[-1], "ticks": ticks, "digits": digits}


def _environment() -> Environment:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError:
        raise OuroborosError("reports need jinja2: pip install 'ouroboros-lm[report]'") from None
    loader, spaces = PackageLoader("ouroboros", "report"), {"trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, finalize=_finalize, **spaces)
    environment.filters.update(
        bits=bits, quantity=quantity, plural=plural, color=arm_color, picture=_picture, axis=axis
    )
    return environment


def _picture(chart: Chart) -> str:
    """The drawn chart as a ``data:`` address."""
    return "data:image/svg+xml;base64," + base64.b64encode(drawn(chart).encode()).decode()


def _finalize(value: Any) -> Any:
    """Every text that reaches the page is cleaned; markup of our own has ``__html__`` and passes."""
    if isinstance(value, (str, bytes)) and not hasattr(value, "__html__"):
        return displayable(value)
    return value
