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


def bits(value: float | None) -> str:
    """Bits per byte with three decimals.

    >>> bits(1.43219)
    '1.432'
    """
    return MISSING if finite(value) is None else f"{value:.3f}"


def signed_bits(value: float | None) -> str:
    """A difference in bits per byte with its sign (U+2212 for minus)."""
    return MISSING if finite(value) is None else f"{value:+.3f}".replace("-", chr(0x2212))


def quantity(value: float | None, unit: str = "") -> str:
    """Three significant digits with a decimal prefix and ``unit``.

    >>> quantity(4_712_345), quantity(3_534_258, "B"), quantity(950, "B"), quantity(12)
    ('4.71 M', '3.53 MB', '950 B', '12')
    """
    number = finite(value)
    if number is None:
        return MISSING
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        # 999.5 and above would be written as 1000 of the smaller unit.
        if abs(number) >= 0.9995 * 10**power:
            return f"{_three_digits(number / 10**power)} {prefix}{unit}"
    return f"{_three_digits(number)} {unit}".rstrip()


def percent(share: float | None) -> str:
    """A share as a percentage with one decimal.

    >>> percent(0.5512), percent(0.0002), percent(0.0)
    ('55.1 %', '< 0.1 %', '0 %')
    """
    number = finite(share)
    if number is None:
        return MISSING
    if number in (0, 1):
        return f"{100 * number:.0f} %"
    return "< 0.1 %" if 0 < number < 0.0005 else "> 99.9 %" if 0.9995 <= number < 1 else f"{100 * number:.1f} %"


def plural(count: int, noun: str) -> str:
    """A count with its noun.

    >>> plural(1, "document"), plural(1_718, "document")
    ('1 document', '1,718 documents')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def tick(value: float) -> str:
    """A round number on an axis, as short as it goes.

    >>> tick(2_500_000.0), tick(500.0)
    ('2.5 M', '500')
    """
    for power, prefix in ((9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:g} {prefix}"
    return f"{value:g}"


def _three_digits(value: float) -> str:
    if value == int(value) and abs(value) < 1000:
        return str(int(value))
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}"
