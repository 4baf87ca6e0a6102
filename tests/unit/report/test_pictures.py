"""What the page says beside the pictures of the delta residuals."""

from __future__ import annotations

import dataclasses

from ouroboros.report import Arm, Report
from ouroboros.report.delta import DeltaFacts
from ouroboros.report.page import to_html
from ouroboros.report.pictures import lead, pictures, table
from ouroboros.schedule import parse


def test_every_picture_has_words(facts: DeltaFacts) -> None:
    found = pictures(facts)
    assert len(found) == 18 and len({picture.title for picture in found}) == 18
    for picture in found:
        assert picture.svg.startswith("<svg") and len(picture.words) > 20 and " %" not in picture.words
    words = {picture.title: picture.words for picture in found}
    assert "not the Jacobian of the layer" in words["Eigenvalue along k by depth"]
    assert "frozen shortcuts alone" in words["Product of the shortcuts by depth"]
    assert "width 16 would give 0.20" in words["Do residuals use the same directions?"]


def test_pictures_without_data_are_left_out(facts: DeltaFacts) -> None:
    less = dataclasses.replace(facts, erase=False, product=None, coupling=None, readings=(), ablations=())
    titles = [picture.title for picture in pictures(less)]
    assert len(titles) == 8 and not {"Eigenvalue along k by depth", "Keep, erase or reflect"} & set(titles)
    assert "2 turns it round" in pictures(facts)[0].words and "2 adds twice as much" in pictures(less)[0].words
    assert "left out" in lead(less) and "only writes" in lead(less)


def test_lead_says_what_was_looked_at(facts: DeltaFacts) -> None:
    text = lead(facts)
    assert "finished model on 24 tokens of its test text (2 sequences of 12)" in text
    assert "2 blocks, 3 visits" in text and "at even distances" not in text
    plain = dataclasses.replace(facts, schedule=parse("3"))
    assert "visits" not in lead(plain)
    assert "Of the 40 visits 32 at even distances are drawn." in lead(dataclasses.replace(facts, schedule=parse("40")))


def test_table_has_a_line_for_each_residual(facts: DeltaFacts) -> None:
    rows = table(facts)
    assert [row[0] for row in rows[:2]] == ["0 attention", "0 feed-forward"] and len(rows) == 6
    assert all(len(row) == 9 for row in rows)


def test_page_with_and_without(facts: DeltaFacts) -> None:
    arm = Arm(name="one", bits_per_byte=1.5)
    html = to_html(Report(title="x", arms=[arm], delta=facts))
    assert 'id="residual"' in html and facts.headline in html and html.count('class="chart"') == 18
    assert html.count("<tr>") == 1 + 6 and len(html) < 400_000
    plain = to_html(Report(title="x", arms=[arm]))
    # Not a byte of the style sheet or the section is left without them.
    assert "residual" not in plain
