"""Bits of codes for some of a model's tensors, as a user writes them: ``looped=8``, ``*.mlp.*=4``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ouroboros.errors import check

PLACES = ("once", "looped", "outside")
"""Where a tensor is: in a block that is visited once, in one that is visited several times or at the boundaries of a
loop, or anywhere else, such as embeddings, stem and head."""


class Width(NamedTuple):
    """Bits for the tensors of a place, or for those whose names match a pattern with ``*`` and ``?``."""

    which: str
    bits: int


def parse_widths(texts: Sequence[str], option: str) -> tuple[Width, ...]:
    """The widths that ``WHICH=BITS`` texts stand for, in their order.

    Raises:
        OuroborosError: a text of another form, or bits that are not 2 to 8; names ``option``.
    """
    found = []
    for text in texts:
        which, _, bits = text.rpartition("=")
        check(
            bool(which) and bits in tuple("2345678"),
            f"{option}: {text!r} is not WHICH=BITS, where WHICH is {', '.join(PLACES)} or a pattern of names, and BITS"
            " is 2 to 8: write looped=8 or *.mlp.*=4",
        )
        found.append(Width(which, int(bits)))
    return tuple(found)
