"""What a report says, as plain values: filled by ``ouroboros demo`` and ``ouroboros report``, drawn by the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ouroboros.report.text import finite

if TYPE_CHECKING:
    from ouroboros.eval.baselines import Baseline
    from ouroboros.eval.stats import Difference
    from ouroboros.report.drawing import Chart


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One trained model of the comparison. What is None or empty is left out of the page."""

    name: str
    description: str = ""
    layout: str = ""
    """Schedule notation, for example ``"2 (2)x3 2"``; drawn as boxes."""
    parameters: int | None = None
    stored_bytes: int | None = None
    """Bytes at 6 bits per parameter, before compression."""
    training_flops_per_token: int | None = None
    tokens: int | None = None
    """Training tokens seen."""
    minutes: float | None = None
    """Wall-clock minutes of training."""
    tokens_per_second: float | None = None
    bits_per_byte: float | None = None
    """On held-out text."""
    interval: tuple[float, float] | None = None
    """95 % interval of ``bits_per_byte``."""
    metrics: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    """Records of ``metrics.jsonl``: of ``kind`` train, valid and telemetry; others are passed over."""
    recipe: str = field(default="", repr=False)
    """The resolved recipe as JSON text."""


class LoopPoint(NamedTuple):
    """The score of one arm at one loop count."""

    loops: int
    bits_per_byte: float
    low: float | None = None
    high: float | None = None
    trained: bool = False
    """Whether the arm was trained with this count."""


class Sample(NamedTuple):
    """Text that an arm wrote; it may hold anything, and is cleaned and escaped."""

    prompt: str | bytes
    text: str | bytes
    """The continuation, without the prompt."""
    arm: str = ""
    settings: str = ""
    """How it was sampled, for example ``temperature 0.8, top-p 0.95, seed 0``."""


class Row(NamedTuple):
    """One line of a ranking."""

    name: str
    detail: str
    bits_per_byte: float
    """A score, or a difference."""
    low: float | None
    high: float | None
    arm: int | None
    """Index of the arm, which gives the row its colour; None for a baseline."""
    mark: str = ""
    """A word behind the name: ``best``, ``level`` (two arms that cannot be told apart), or what a study found."""


class Absent(NamedTuple):
    """What a ranking has no number of."""

    name: str
    mark: str
    """What became of it, in a word or two."""
    detail: str
    """Why."""


class Ranking(NamedTuple):
    """Rows from the best to the worst, each with a dot and its interval on a common axis."""

    rows: Sequence[Row]
    absent: Sequence[Absent] = ()
    """Stand below the rows."""
    differences: bool = False
    """Whether the rows are differences to one that is at zero, and not scores."""
    title: str = ""
    note: str = ""
    """Stands below the rows."""


class Table(NamedTuple):
    """Rows of cells, of which the first names the row."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    """Stands below the table."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page: rankings, charts and tables, in this order, under a title."""

    ident: str
    """Unique on the page."""
    title: str
    headline: str = ""
    """The one sentence to remember; `ouroboros report` prints it too."""
    lead: str = ""
    rankings: Sequence[Ranking] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything on the page. Sections without data are left out."""

    title: str
    headline: str = ""
    """One sentence that says plainly who won, or that nobody can tell."""
    subtitle: str = ""
    """What was done, in one line."""
    command: str = ""
    """The exact command that makes the same result again."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    arms: Sequence[Arm] = ()
    baselines: Sequence[Baseline] = ()
    """On the same held-out text."""
    loop_curve: Mapping[str, Sequence[LoopPoint]] = field(default_factory=dict)
    """By arm name."""
    samples: Sequence[Sample] = ()
    notes: Sequence[str] = ()
    """Honest caveats, for example that there is one seed."""
    findings: Sequence[Section] = ()
    """Parts of the page that come first: what a study found."""
    sections: Sequence[Section] = ()
    """Parts of the page that only some runs have, in order: about the data, and what systems bring."""
    difference: Difference | None = None
    """``arms[0]`` minus ``arms[1]`` on the same text."""
    decided: bool = True
    """Whether the difference may say who won; the headline then says why not."""

    @property
    def rows(self) -> list[Row]:
        """Arms and baselines by bits per byte, the best first; scores that are not finite are left out."""
        scored = [(arm, arm.description, index) for index, arm in enumerate(self.arms)]
        scored += [(baseline, baseline.detail, None) for baseline in self.baselines]
        rows = [
            Row(one.name, detail, score, *(one.interval or (None, None)), index)
            for one, detail, index in scored
            if (score := finite(one.bits_per_byte)) is not None
        ]
        rows.sort(key=lambda row: (row.bits_per_byte, row.name))
        if len(rows) < 2:
            return rows
        open_ = self.difference is not None and self.difference.verdict == "cannot tell"
        marks = ["level", "level"] if open_ and {rows[0].arm, rows[1].arm} == {0, 1} else ["best"]
        return [row._replace(mark=mark) for row, mark in zip(rows, marks)] + rows[len(marks) :]

    @property
    def results(self) -> list[Section]:
        """What comes first on the page: the scores of two or more, then the findings."""
        rows = self.rows
        if len(rows) < 2:
            return list(self.findings)
        note = "The dot is the score, the bar its 95 % interval where there is one. The axis does not begin at zero."
        lead = (
            "Bits per byte: how many bits a model needs to write down one byte of text it has never seen. Lower is"
            " better; 8 is knowing nothing."
        )
        scores = Section(ident="results", title="Results", lead=lead, rankings=[Ranking(rows, note=note)])
        return [scores, *self.findings]


def verdict_sentence(first: str, second: str, difference: Difference) -> str:
    """Who won, in one sentence; ``difference`` is ``first - second`` in bits per byte, so the lower is better."""
    if difference.low is None or difference.high is None:
        return f"Cannot tell: the difference of {first} and {second} has no interval."
    near, far = sorted((abs(difference.low), abs(difference.high)))
    if difference.verdict == "cannot tell":
        return (
            f"Cannot tell: {first} needs {abs(difference.delta):.3f} bits per byte "
            f"{'less' if difference.delta < 0 else 'more'} than {second}, but the 95 % interval of the difference, "
            f"{difference.low:+.3f} to {difference.high:+.3f}, contains zero."
        )
    winner, loser = (first, second) if difference.verdict == "better" else (second, first)
    return (
        f"{winner} wins: it needs {abs(difference.delta):.3f} bits per byte less than {loser} "
        f"on the same held-out text (95 % interval {near:.3f} to {far:.3f})."
    )
