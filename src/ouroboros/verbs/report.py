"""``ouroboros report RUN``: a page about a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ouroboros.verbs.options import Run, log_to_stderr, parse, say


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write one self-contained HTML page about a run: curves, schedule, telemetry."""

    run: Run
    out: Path
    """The HTML file to write."""


def report(arguments: Sequence[str]) -> int:
    """The verb ``report``."""
    options = parse(ReportOptions, "report", arguments)
    log_to_stderr()
    from ouroboros.report import render, report_from_run

    page = report_from_run(options.run)
    render(page, options.out)
    say(f"{options.out}: written")
    for section in page.sections:
        if section.headline:
            say(section.headline)
    return 0
