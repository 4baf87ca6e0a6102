"""Renders a report as Markdown: everything of the page but its pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ouroboros.report.content import Ranking, Report, Section, Table
from ouroboros.report.text import MISSING, bits, displayable

_SPECIAL = re.compile(r"([\\`*_<>\[\]|#~])")


def to_markdown(report: Report) -> str:
    """The report as text with tables as of GitHub; see :func:`ouroboros.report.page.render`."""
    return "\n\n".join(_blocks(report)) + "\n"


def _blocks(report: Report) -> Iterator[str]:
    yield f"# {_text(report.title)}"
    yield from map(_text, filter(None, [report.subtitle]))
    yield from (f"**{_text(line)}**" for line in [report.headline] if line)
    for section in report.results:
        yield from _section(section)
    if report.notes:
        yield "## Before you quote this"
        yield "\n".join(f"- {_text(note)}" for note in report.notes)
    if report.arms:
        yield "## The models"
        cards = [
            f"- **{_text(arm.name)}**{f' ({_text(arm.layout)})' if arm.layout else ''}: {_text(arm.description)}"
            for arm in report.arms
        ]
        yield "\n".join(card.removesuffix(": ") for card in cards)
    for section in report.sections:
        yield from _section(section)
    if report.environment:
        yield "## Do it again"
        yield from (_fenced(line) for line in [report.command] if line)
        yield "\n".join(f"- {_text(name)}: {_text(value)}" for name, value in report.environment.items())


def _section(section: Section) -> Iterator[str]:
    yield f"## {_text(section.title)}"
    yield from (f"**{_text(line)}**" for line in [section.headline] if line)
    yield from map(_text, filter(None, [section.lead]))
    for ranking in section.rankings:
        yield from (f"### {_text(line)}" for line in [ranking.title] if line)
        yield from _table(_of(ranking))
    for table in section.tables:
        yield from _table(table)


def _of(ranking: Ranking) -> Table:
    """A ranking as a table."""
    sign, digits = ("+", 4) if ranking.differences else ("", 3)
    rows = []
    for row in ranking.rows:
        known = row.low is not None and row.high is not None
        interval = f"{bits(row.low, sign, digits)} to {bits(row.high, sign, digits)}" if known else MISSING
        rows.append([row.name, bits(row.bits_per_byte, sign, digits), interval, row.mark, row.detail])
    rows += [[one.name, MISSING, MISSING, one.mark, one.detail] for one in ranking.absent]
    name = "difference" if ranking.differences else "bits per byte"
    return Table(head=("Model", name, "95 % interval", "", ""), rows=rows, note=ranking.note)


def _table(table: Table) -> Iterator[str]:
    rows: list[Sequence[str]] = [table.head, ["---"] + ["---:"] * (len(table.head) - 1)]
    lines = [[_text(cell) for cell in row] if index != 1 else row for index, row in enumerate([*rows, *table.rows])]
    yield "\n".join(f"| {' | '.join(line)} |" for line in lines)
    yield from map(_text, filter(None, [table.note]))


def _fenced(text: str) -> str:
    return "```sh\n" + displayable(text).replace("```", "") + "\n```"


def _text(value: object) -> str:
    """Text of which nothing acts as markup."""
    return _SPECIAL.sub(r"\\\1", " ".join(displayable(str(value)).split()))
