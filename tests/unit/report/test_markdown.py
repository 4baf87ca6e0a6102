"""Markdown of a report: the same words as the page, and nothing in them that acts as markup."""

from __future__ import annotations

from pathlib import Path

from ouroboros.report import render
from ouroboros.report.content import Absent, Arm, Ranking, Report, Row, Section, Table
from ouroboros.report.markdown import to_markdown


def test_a_comparison_with_all_its_sections(comparison: Report, tmp_path: Path) -> None:
    text = to_markdown(comparison)
    assert text.startswith("# Does looping pay?\n\n") and "**loop wins.**" in text
    assert "| loop | 1.411 | 1.390 to 1.430 | best | prelude, loop, coda |" in text
    assert "- One seed each." in text and "```sh\nouroboros demo --minutes 1 --seed 0\n```" in text
    render(comparison, tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == text


def test_foreign_text_is_no_markup() -> None:
    name = "a|b<i>_c_`d`\n# e\x00\u202e"
    row = Row(name, name, 0.0, None, None, None, name)
    ranking = Ranking([row], [Absent(name, "dead", name)], differences=True)
    table = Table(head=(name, name), rows=[[name, name]], note=name)
    section = Section(ident="x", title=name, rankings=[ranking], tables=[table])
    text = to_markdown(Report(title=name, arms=[Arm(name=name)], sections=[section], environment={name: name}))
    safe = "a\\|b\\<i\\>\\_c\\_\\`d\\` \\# e\ufffd\ufffd"
    assert text.replace(safe, "X").count("a|b") == 0 and text.startswith(f"# {safe}\n")
    assert "| X | +0.0000 | \u2013 | X | X |" in text.replace(safe, "X") and "- **X**\n" in text.replace(safe, "X")
