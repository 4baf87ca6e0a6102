from __future__ import annotations

from xml.etree import ElementTree

from ouroboros.report.palette import LIGHT
from ouroboros.report.svg import embed

DOCUMENT = f"""<?xml version="1.0"?>
<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">
<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="9pt" viewBox="0 0 9 9">
 <metadata>http://purl.org/</metadata>
 <defs>
  <style>*{{color: red}}</style><clipPath id="clip"><rect id="unused" width="1.23456" height="2"/></clipPath></defs>
 <path id="dot" d="M 0.123456 -1.999999
L 2 3" style="stroke: {LIGHT["arm0"]}; fill: #123456"/>
 <use xlink:href="#dot" clip-path="url(#clip)"/>
 <a xlink:href="https://example.org/"><text style="font-family: 'X', serif; font-size: 9px">a &lt;b&gt; #dot </text></a>
</svg>"""


def test_embedded_svg_stands_alone_on_a_page() -> None:
    svg = embed(DOCUMENT, ident="one", label='a "quoted" <label>')
    root = ElementTree.fromstring(svg)
    assert root.get("viewBox") == "0 0 9 9" and root.get("width") is None
    assert root.get("aria-label") == 'a "quoted" <label>'
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert ids == ["one-clip", "one-dot"]
    assert 'href="#one-dot"' in svg and 'clip-path="url(#one-clip)"' in svg
    for gone in ("<?xml", "DOCTYPE", "purl", "style>", "xlink", "example.org", "font-family", "unused"):
        assert gone not in svg
    assert svg.count("http") == 1  # the namespace


def test_colors_become_properties_and_numbers_short() -> None:
    svg = embed(DOCUMENT, ident="one", label="")
    assert f"stroke: var(--arm0, {LIGHT['arm0']}); fill: #123456" in svg
    assert 'd="M 0.12 -2.00 L 2 3"' in svg and 'width="1.23"' in svg
    assert ">a &lt;b&gt; #dot <" in svg


def test_charts_with_different_names_share_no_identifier() -> None:
    first, second = (ElementTree.fromstring(embed(DOCUMENT, ident=i, label="")) for i in ("one", "two"))
    ids = [{e.get("id") for e in root.iter() if e.get("id")} for root in (first, second)]
    assert ids[0] and not ids[0] & ids[1]
