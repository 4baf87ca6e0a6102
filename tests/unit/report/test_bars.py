from __future__ import annotations

import dataclasses
from xml.etree import ElementTree

import pytest

from ouroboros.report.bars import MAX_SOURCES, heaviest, length_chart, share_chart
from ouroboros.report.data import Lengths, Source
from ouroboros.report.palette import LIGHT

LENGTHS = Lengths(documents=[0, 0, 4, 8, 2], lost=[0, 0, 4.0, 3.5, 0.2], block=8, documents_lost=5, tokens_lost=40)


def source(label: str, weight: float, drawn: float | None = None, published: float | None = None) -> Source:
    return Source(
        name=label,
        label=label,
        format="plain text",
        weight=weight,
        splits={},
        drawn_share=drawn,
        published_share=published,
    )


def texts(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("text")]


PAIR = [source("code", 0.7, 0.69, 0.12), source("maths", 0.3, 0.31, 0.88)]


@pytest.mark.parametrize("draw", [lambda: share_chart(PAIR), lambda: length_chart(LENGTHS, ident="l")])
def test_charts_are_valid_and_deterministic(draw) -> None:
    svg = draw()
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg") and root.get("aria-label") and svg == draw()
    for word in svg.replace(";", " ").replace('"', " ").replace(")", " ").split():
        assert not word.startswith("#") or word in LIGHT.values() or "-" in word, word


def test_shares_stand_side_by_side() -> None:
    found = texts(share_chart(PAIR))
    assert {"code", "maths", "weight", "this run", "published pipeline"} <= set(found)
    assert {"70.0 %", "69.0 %", "12.0 %", "88.0 %"} <= set(found)


def test_unknown_shares_are_left_out() -> None:
    found = texts(share_chart([dataclasses.replace(one, drawn_share=None) for one in PAIR]))
    assert "this run" not in found and "published pipeline" in found
    assert share_chart(PAIR[:1]) == share_chart([]) == ""


def test_names_are_text_and_cut() -> None:
    found = texts(share_chart([source("<b>$x_1$ & so on and so on", 0.5), source("_b", 0.5)]))
    assert "<b>$x_1$ & so on " + chr(0x2026) in found and "b" in found


def test_the_heaviest_sources_are_shown_in_their_order() -> None:
    many = [source(f"s{i}", 0.01 * (i + 1)) for i in range(MAX_SOURCES + 2)]
    assert heaviest(many) == many[2:] and heaviest(PAIR) == PAIR
    found = texts(share_chart(many))
    assert "s2" in found and "s1" not in found


def test_lengths_are_marked_at_the_block() -> None:
    svg = length_chart(LENGTHS, ident="l")
    found = texts(svg)
    assert {"in a block", "lost by the block cut", "8 tokens", "4", "16", "32", "documents"} <= set(found)
    assert "--arm0" in svg and "--arm1" in svg


def test_long_and_no_documents() -> None:
    far = Lengths(documents=[1] + [0] * 19 + [3], lost=[1.0] + [0.0] * 20, block=64, documents_lost=1, tokens_lost=1)
    found = texts(length_chart(far, ident="l"))
    assert "1" in found and any(text.endswith(" Ki") for text in found)
    empty = dataclasses.replace(LENGTHS, documents=[0, 0], lost=[0.0, 0.0])
    assert length_chart(empty, ident="l") == ""
