"""One self-contained HTML page about a comparison or a single run. Needs the extra ``report``."""

from ouroboros.report.content import Arm, LoopPoint, Report, Row, Sample, Section, verdict_sentence
from ouroboros.report.page import render
from ouroboros.report.run import report_from_run

__all__ = [
    "Arm",
    "LoopPoint",
    "Report",
    "Row",
    "Sample",
    "Section",
    "render",
    "report_from_run",
    "verdict_sentence",
]
