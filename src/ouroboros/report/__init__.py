"""One self-contained HTML page about a comparison or a single run. Needs the extra ``report``."""

from ouroboros.report.page import render
from ouroboros.report.run import report_from_run

__all__ = ["render", "report_from_run"]
