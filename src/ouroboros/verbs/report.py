"""``ouroboros report RUN_OR_STUDY``: a page about a run, a study or a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from ouroboros.verbs.options import log_to_stderr, parse, say


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write one self-contained page: about a run with its curves, schedule and telemetry, or about a study or a
    comparison with its answer, its arms from the best to the worst, what they cost and who was left out."""

    directory: tyro.conf.Positional[Path]
    """The directory of `ouroboros train`, `ouroboros ablate` or `ouroboros compare`, which need not be complete."""
    out: Path
    """The file to write: HTML, or Markdown without pictures if its name ends in .md."""


def report(arguments: Sequence[str]) -> int:
    """The verb ``report``."""
    options = parse(ReportOptions, "report", arguments)
    log_to_stderr()
    from ouroboros.ablate.runner import MANIFEST
    from ouroboros.report import render, report_from_run, report_from_study

    study = (options.directory / MANIFEST).is_file()
    page = report_from_study(options.directory) if study else report_from_run(options.directory)
    render(page, options.out)
    say(f"{options.out}: written")
    if study:
        say(page.headline)
    for section in page.sections:
        if section.headline:
            say(section.headline)
    return 0
