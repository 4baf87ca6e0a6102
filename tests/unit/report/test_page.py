from __future__ import annotations

import dataclasses
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ouroboros.errors import OuroborosError
from ouroboros.eval.baselines import Baseline
from ouroboros.report import render
from ouroboros.report.content import Arm, Report, Row, Sample, Section, Table
from ouroboros.report.drawing import Chart
from ouroboros.report.page import axis, to_html

VOID = {"meta", "br", "hr", "img", "link", "input"}


@pytest.fixture(scope="module")
def html(comparison: Report) -> str:
    """The page of the comparison, drawn once for all tests that only look at it."""
    return to_html(comparison)


class Page(HTMLParser):
    """Collects what a page holds, and checks that its elements are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        self.ids += [value or "" for key, value in attrs if key == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_page_holds_every_section(html: str) -> None:
    page = Page(html)
    text = " ".join(" ".join(page.text).split())
    for wanted in (
        "Does looping pay?",
        "Both arms saw the same bytes.",
        "loop wins.",
        "Lower is better",
        "1.411",
        "1.390 to 1.430",
        "best",
        "order-4 n-gram",
        "One seed each.",
        "2 (2)x3 2",
        "4.89 M",
        "3.67 MB",
        "56.4 M",
        "1.5 min",
        "7.8 k",
        "Inside the loops of loop",
        "temperature 0.8",
        "ouroboros demo --minutes 1 --seed 0",
        "2.13.0",
    ):
        assert wanted in text, wanted
    assert page.tags["svg"] == 1 and page.tags["img"] == 2 + 4  # brand; loss, loops and telemetry
    assert set(page.ids) >= {"results", "notes", "models", "curves", "loops-0", "samples", "reproduce"}
    assert re.findall(r'class="name">([^<]+)<', html) == ["loop", "gpt", "xz", "order-4 n-gram"]


def test_page_needs_nothing_but_itself(html: str) -> None:
    page = Page(html)
    assert not page.tags.keys() & {"script", "link", "iframe", "object", "embed", "image", "base"}
    for tag, key, value in page.attributes:
        if key == "src":
            assert tag == "img" and value.startswith("data:image/svg+xml;base64,")
            continue
        assert key not in {"srcset", "action", "poster"} and not key.startswith("on"), (tag, key)
        assert "//" not in value or (key, value) == ("xmlns", "http://www.w3.org/2000/svg"), (tag, key, value)
        if key in {"href", "xlink:href"}:
            assert value.startswith("#")
    style = re.search(r"<style>(.*?)</style>", html, re.S)
    assert style is not None and not re.search(r"@import|url\(", style.group(1))
    assert "prefers-color-scheme: dark" in style.group(1)


def test_identifiers_are_unique_and_pictures_are_described(html: str) -> None:
    page = Page(html)
    assert [name for name, count in Counter(page.ids).items() if count > 1] == []
    described = [value for tag, key, value in page.attributes if (tag, key) == ("img", "alt")]
    assert "Bits per byte during training: bits per byte against step" in described
    assert len(set(described)) == page.tags["img"]


def test_sections_are_drawn_in_order() -> None:
    chart = Chart(title="A <chart>", draw=lambda axes: axes.plot([1, 2]), x="time, s", y="height, m", words="50 % <up>")
    tables = [Table(("x", "y"), [("1", "<2>")], note="a note")]
    section = Section(ident="one", title="One", headline="Mind this.", lead="It is so.", charts=[chart])
    full = dataclasses.replace(section, tables=tables)
    html = to_html(Report(title="x", sections=[full, Section(ident="two", title="Two")]))
    page = Page(html)
    assert page.ids == ["one", "two"] and (page.tags["img"], page.tags["table"]) == (1, 1)
    for wanted in (
        "<strong>Mind this.</strong> It is so.",
        "A &lt;chart&gt;",
        "50 % &lt;up&gt;",
        'alt="A &lt;chart&gt;: height, m against time, s"',
        "<td>&lt;2&gt;</td>",
        "a note",
    ):
        assert wanted in html, wanted


def test_samples_are_escaped_and_cleaned(html: str) -> None:
    assert "&lt;/pre&gt;&lt;script&gt;alert(1)&lt;/script&gt;&amp;amp; \ufffd\ufffd[31m\ufffd\ufffd $x_1$" in html
    html.encode("utf-8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", html)


FIELDS = ("title", "headline", "subtitle", "command", "note", "name", "description", "baseline", "fact")


@pytest.mark.parametrize("field", FIELDS)
def test_every_text_is_escaped(field: str) -> None:
    text = dict.fromkeys(FIELDS, "plain") | {field: '<b onclick="x">\'&\x00'}
    arm = Arm(name=text["name"], description=text["description"], bits_per_byte=1.0)
    arm = dataclasses.replace(arm, metrics=[{"kind": "train", "step": 1, "bits_per_byte": 1.0}], recipe=text["fact"])
    html = to_html(
        Report(
            title=text["title"],
            headline=text["headline"],
            subtitle=text["subtitle"],
            command=text["command"],
            environment={text["fact"]: text["fact"]},
            arms=[arm],
            baselines=[
                Baseline(name=text["baseline"], bytes=1, train_bytes=1, bits_per_byte=2.0, detail=text["baseline"])
            ],
            samples=[Sample(prompt=text["note"], text=text["note"], arm=text["name"], settings=text["note"])],
            notes=[text["note"]],
        )
    )
    page = Page(html)
    assert "<b" not in html.replace("<body", "") and "\x00" not in html
    assert not page.tags["b"]
    assert '<b onclick="x">\'&\ufffd' in "".join(page.text)


@settings(max_examples=15)
@given(st.text(st.characters(exclude_categories=())), st.binary())
def test_any_sample_leaves_the_page_whole(prompt: str, text: bytes) -> None:
    html = to_html(Report(title="x", samples=[Sample(prompt=prompt, text=text)]))
    html.encode("utf-8")
    page = Page(html)
    assert page.tags["pre"] == 1 and page.tags["section"] == 1


def test_sections_without_data_are_left_out() -> None:
    page = Page(to_html(Report(title="Empty")))
    assert page.ids == [] and not page.tags.keys() & {"section", "table", "pre", "figure", "ul"}
    only = Page(to_html(Report(title="x", notes=["careful"])))
    assert only.ids == ["notes"]
    single = to_html(Report(title="x", arms=[Arm(name="one", bits_per_byte=1.5)]))
    assert Page(single).ids == ["models"] and "The model<" in single and "1.500" in single


@pytest.mark.parametrize(("low", "high", "tone"), [(-2.0, -1.0, "arm0"), (1.0, 2.0, "arm1"), (-1.0, 2.0, "even")])
def test_headline_is_coloured_by_the_winner(low: float, high: float, tone: str, comparison: Report) -> None:
    assert comparison.difference is not None
    verdict = {"arm0": "better", "arm1": "worse", "even": "cannot tell"}[tone]
    difference = dataclasses.replace(comparison.difference, low=low, high=high, verdict=verdict)
    arms = [dataclasses.replace(arm, metrics=()) for arm in comparison.arms]
    html = to_html(dataclasses.replace(comparison, difference=difference, arms=arms, loop_curve={}))
    assert f'class="verdict {tone}"' in html
    assert html.count('class="mark">level<') == (2 if tone == "even" else 0)


def test_long_samples_are_cut_and_say_so() -> None:
    html = to_html(Report(title="x", samples=[Sample(prompt="", text="y" * 5000)]))
    assert "y" * 4000 in html and "y" * 4001 not in html and "(1000 more characters)" in html


def drawn_schedule(layout: str) -> tuple[str, list[str]]:
    """What a layout's drawing says of itself, and the texts of its blocks."""
    html = to_html(Report(title="x", arms=[Arm(name="one", layout=layout)]))
    label, blocks = re.findall(r'aria-label="([^"]*)">(.*?)<p class="small">', html, re.S)[0]
    return label, " ".join(Page(f"<div>{blocks}</div>").text).split()


def test_schedules_have_blocks_and_loops() -> None:
    label, blocks = drawn_schedule("2 (2)x3 2")
    assert label == "layout 2 (2)x3 2: 6 stored blocks, 10 visits"
    assert blocks == ["tokens", "0", "1", "2", "3", "\u21ba", "\u00d73", "4", "5", "logits"]
    assert drawn_schedule("1")[0] == "layout 1: 1 stored block, 1 visit"
    assert drawn_schedule("100")[1] == ["tokens", "0", "1", "\u2026", "99", "logits"]
    with pytest.raises(OuroborosError, match="layout"):
        drawn_schedule("(2)x0")


def row(score: float, low: float | None = None, high: float | None = None) -> Row:
    return Row(name="x", detail="", bits_per_byte=score, low=low, high=high, arm=None)


@given(st.lists(st.tuples(st.floats(0.01, 20), st.floats(0, 2)), min_size=1, max_size=8))
def test_axis_covers_every_row_with_few_round_ticks(scores: list[tuple[float, float]]) -> None:
    rows = [row(score, score - reach, score + reach) for score, reach in scores]
    found = axis(rows)
    for one in rows:
        assert one.low is not None and one.high is not None
        assert found["low"] - 1e-9 <= one.low <= one.high <= found["high"] + 1e-9
    assert 2 <= len(found["ticks"]) <= 9
    assert found["ticks"] == sorted(set(found["ticks"]))
    assert len({f"{tick:.{found['digits']}f}" for tick in found["ticks"]}) == len(found["ticks"])


def test_file_is_small_deterministic_and_replaced_atomically(comparison: Report, html: str, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("old")
    render(comparison, out)
    assert out.read_text(encoding="utf-8") == html
    assert html.startswith("<!DOCTYPE html>") and len(html.encode()) < 1_000_000
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "report.html"
    out.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OuroborosError, match=r"cannot write .*report\.html: No space left on device"):
        render(Report(title="x"), out)
    assert out.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_places_that_cannot_hold_a_page_are_named(tmp_path: Path) -> None:
    with pytest.raises(OuroborosError, match="is a directory; give a file name"):
        render(Report(title="x"), tmp_path)
    with pytest.raises(OuroborosError, match="cannot write .*: No such file or directory"):
        render(Report(title="x"), tmp_path / "none" / "report.html")
    (tmp_path / "file").touch()
    with pytest.raises(OuroborosError, match="cannot write"):
        render(Report(title="x"), tmp_path / "file" / "report.html")


def test_missing_jinja2_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(OuroborosError, match=r"jinja2.*pip install 'ouroboros-lm\[report\]'"):
        render(Report(title="x"), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []
