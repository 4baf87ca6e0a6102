from __future__ import annotations

from xml.etree import ElementTree
from xml.sax.saxutils import escape

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ouroboros.report.text import (
    MISSING,
    REPLACEMENT,
    bits,
    displayable,
    finite,
    percent,
    plural,
    quantity,
)


def any_text() -> st.SearchStrategy[str]:
    """Every code point, lone surrogates among them."""
    return st.text(st.characters(exclude_categories=()))


@given(any_text())
def test_displayable_text_is_valid_in_xml_and_utf8(text: str) -> None:
    shown = displayable(text)
    shown.encode("utf-8")
    assert (ElementTree.fromstring(f"<p>{escape(shown)}</p>").text or "") == shown
    assert displayable(shown) == shown


@given(st.binary())
def test_bytes_are_read_as_utf8(data: bytes) -> None:
    assert displayable(data) == displayable(data.decode("utf-8", errors="replace"))


def test_displayable_keeps_layout_and_replaces_what_hides() -> None:
    assert displayable("a\tb\r\nc\rd\n") == "a\tb\nc\nd\n"
    assert displayable("\x00\x1b\x7f\x9b\u202e\u2066\udc80") == REPLACEMENT * 7
    assert displayable(b"\xff ok") == REPLACEMENT + " ok"
    assert displayable("caf\u00e9 \u4e2d \U0001f40d") == "caf\u00e9 \u4e2d \U0001f40d"


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (4_712_345, "", "4.71 M"),
        (3_534_258, "B", "3.53 MB"),
        (950, "B", "950 B"),
        (999_600, "", "1 M"),
        (12, "", "12"),
        (9712.4, "", "9.71 k"),
        (56_400_000_000, "", "56.4 G"),
        (0, "", "0"),
        (0.5, "", "0.5"),
        (None, "B", MISSING),
        (float("nan"), "", MISSING),
    ],
)
def test_quantity(value: float | None, unit: str, expected: str) -> None:
    assert quantity(value, unit) == expected


@given(st.floats(1, 1e16))
def test_quantity_is_within_half_a_percent(value: float) -> None:
    number, _, prefix = quantity(value).partition(" ")
    power = {"": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15}[prefix]
    assert float(number) * 10**power == pytest.approx(value, rel=0.0051)


def test_bits() -> None:
    assert (bits(1.43219), bits(None), bits(float("inf"))) == ("1.432", MISSING, MISSING)
    assert (bits(-0.0271, "+"), bits(0.01, "+")) == ("\u22120.027", "+0.010")


def test_finite_takes_numbers_only() -> None:
    assert finite(2) == 2.0
    assert [finite(v) for v in (True, "1", None, float("nan"), float("inf"), [1])] == [None] * 6


def test_percentages_and_counts() -> None:
    assert [percent(share) for share in (0.5512, 1.0, 0.0, None)] == ["55.1 %", "100.0 %", "0.0 %", MISSING]
    assert (plural(1, "time"), plural(0, "time"), plural(12_345, "byte")) == ("1 time", "0 times", "12,345 bytes")
