"""Numbers and foreign text in a form that is fit to be shown."""

from __future__ import annotations

import math
import re
from typing import Any

REPLACEMENT = chr(0xFFFD)
"""Stands for a byte or character that has no safe or visible form."""
MISSING = chr(0x2013)
"""Stands for a number that is not known (an en dash)."""

# Controls but tab and newline, C1 controls, bidirectional overrides and isolates, surrogates, noncharacters.
_UNSHOWABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


def displayable(text: str | bytes) -> str:
    """``text`` with every character that is invisible, unsafe or not text replaced by U+FFFD.

    Bytes are read as UTF-8. Tabs and newlines stay, line ends become newlines. What is left is valid in HTML and XML
    (still to be escaped) and cannot reorder or hide its surroundings.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", errors="replace")
    return _UNSHOWABLE.sub(REPLACEMENT, text.replace("\r\n", "\n").replace("\r", "\n"))


def finite(value: Any) -> float | None:
    """``value`` as a float if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def bits(value: float | None, sign: str = "", digits: int = 3) -> str:
    """Bits per byte with three decimals, or as many as asked for; with ``sign`` ``+`` a difference.

    >>> bits(1.43219)
    '1.432'
    """
    return MISSING if finite(value) is None else f"{value:{sign}.{digits}f}".replace("-", chr(0x2212))


def quantity(value: float | None, unit: str = "") -> str:
    """Three significant digits with a decimal prefix and ``unit``.

    >>> quantity(4_712_345), quantity(3_534_258, "B"), quantity(950, "B"), quantity(12)
    ('4.71 M', '3.53 MB', '950 B', '12')
    """
    number = finite(value)
    if number is None:
        return MISSING
    for prefix in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5:  # and above it would be written as 1e+03
            return f"{number:.3g} {prefix}{unit}".rstrip()
        number /= 1000
    return f"{number:.3g} P{unit}"


def percent(share: float | None) -> str:
    """A share as a percentage with one decimal.

    >>> percent(0.5512)
    '55.1 %'
    """
    return MISSING if share is None else f"{100 * share:.1f} %"


def plural(count: int, noun: str) -> str:
    """A count with its noun.

    >>> plural(1, "document"), plural(1_718, "document")
    ('1 document', '1,718 documents')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
