"""Makes a drawn SVG fit to stand inside an HTML page beside others."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from ouroboros.report.palette import name_of, var

_HEX = re.compile(r"#[0-9a-fA-F]{6}\b")
_FONT_FAMILY = re.compile(r"font-family:[^;]*;?\s*")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_NUMERIC = {"d", "x", "y", "width", "height", "transform", "points"}
_DROPPED = {"metadata", "style", "title"}


def embed(svg: str, *, ident: str, label: str) -> str:
    """``svg`` rewritten as an element for an HTML page.

    Identifiers that are referred to get the prefix ``ident``, others go, so that charts on one page do not collide.
    Colours of the palette become custom properties, fonts come from the page, and the style sheet (which would rule the
    whole page), metadata and the fixed size go. Coordinates are rounded to 0.01. Needs no namespace but SVG's own.

    Args:
        svg: a whole SVG document.
        ident: unique on the page.
        label: what the picture shows, for readers who do not see it.
    """
    root = ElementTree.fromstring(svg)
    for parent in root.iter():
        for child in [c for c in parent if _local(c.tag) in _DROPPED]:
            parent.remove(child)
    used = set(_references(root))
    for element in root.iter():
        element.tag = _local(element.tag)
        values = {_local(key): value for key, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update({k: v for key, value in values.items() for k, v in _attribute(key, value, ident, used)})
        # The drawing library indents its output; inside a label white space is text.
        if element.tag != "text":
            element.text = (element.text or "").strip() or None
        element.tail = (element.tail or "").strip() or None
    view_box = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib.update(
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "class": "chart",
            "viewBox": view_box,
            "role": "img",
            "aria-label": label,
            "stroke-linejoin": "round",
            "stroke-linecap": "butt",
        }
    )
    return ElementTree.tostring(root, encoding="unicode")


def _attribute(key: str, value: str, ident: str, used: set[str]) -> list[tuple[str, str]]:
    """The attribute as it is written, or nothing where it is not needed."""
    if key == "id":
        return [(key, f"{ident}-{value}")] if value in used else []
    if key == "href":
        return [(key, f"#{ident}-{value[1:]}")] if value.startswith("#") else []
    value = _REFERENCE.sub(lambda match: f"url(#{ident}-{match.group(1)})", value)
    if key == "style":
        value = _HEX.sub(_themed, _FONT_FAMILY.sub("", value))
    elif key in _NUMERIC:
        value = " ".join(_LONG_NUMBER.sub(lambda match: f"{float(match.group()):.2f}", value).split())
    return [(key, value)]


def _references(root: ElementTree.Element) -> list[str]:
    found = []
    for element in root.iter():
        for key, value in element.attrib.items():
            found += _REFERENCE.findall(value)
            if _local(key) == "href" and value.startswith("#"):
                found.append(value[1:])
    return found


def _themed(match: re.Match[str]) -> str:
    name = name_of(match.group())
    return match.group() if name is None else var(name)


def _local(name: str) -> str:
    return name.rpartition("}")[2]
