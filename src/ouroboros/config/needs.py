"""Which option gives another one its effect: declared beside the field, checked in one place for all of them."""

from __future__ import annotations

from typing import Any


def needs(path: str, *values: Any) -> dict[str, tuple[tuple[str, tuple[Any, ...]], ...]]:
    """The metadata of a field that does nothing unless another one has one of some values.

    >>> needs("kind", "muon")
    {'needs': (('kind', ('muon',)),)}

    Args:
        path: of the other field, dotted, from the dataclass in which both stand.
        values: that switch this field on. Without any, every value does that is not off: off are false, zero, null and
            the empty list.
    """
    return {"needs": ((path, values),)}


def is_on(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether ``value`` of the other field is one of those that a field needs, as :func:`needs` declared them."""
    return value in values if values else bool(value)
