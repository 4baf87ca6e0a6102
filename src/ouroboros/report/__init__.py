"""One self-contained HTML page, or Markdown, about a comparison, a study or a run. Needs the extra ``report``."""

from ouroboros.report.page import render
from ouroboros.report.run import report_from_run
from ouroboros.report.study import report_from_study

__all__ = ["render", "report_from_run", "report_from_study"]
