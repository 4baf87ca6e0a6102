"""Specifications as JSON, and back, strictly."""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from typing import Any, TypeVar

from ouroboros.errors import OuroborosError, check, nearest

T = TypeVar("T")


def to_dict(spec: Any) -> dict[str, Any]:
    """The specification as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(spec)))


def to_json(spec: Any) -> str:
    """The specification as indented JSON text."""
    return json.dumps(to_dict(spec), indent=2) + "\n"


def from_dict(cls: type[T], values: dict[str, Any], *, where: str = "") -> T:
    """Read ``values`` as ``cls``, strictly.

    Raises:
        OuroborosError: an unknown key (the nearest valid one is offered), a wrong type, a bad value.
    """
    from pydantic import ValidationError

    _refuse_unknown_keys(cls, values, where or cls.__name__)
    try:
        return _adapter(cls).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise OuroborosError(f"{where or cls.__name__}: {place + ': ' if place else ''}{message}") from None


def from_json(cls: type[T], text: str, *, where: str = "") -> T:
    """Read JSON ``text`` as ``cls``; see :func:`from_dict`."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise OuroborosError(f"{where or cls.__name__}: not JSON: {error}") from None
    check(isinstance(values, dict), f"{where or cls.__name__}: expected a JSON object")
    return from_dict(cls, values, where=where)


@functools.cache
def _adapter(cls: Any) -> Any:
    """The validator of ``cls``; making one takes 20 ms, and a model reads its specification dozens of times."""
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


_type_hints = functools.cache(typing.get_type_hints)


def _refuse_unknown_keys(cls: Any, values: Any, where: str) -> None:
    """Walk nested dataclasses and refuse keys they do not have."""
    if not dataclasses.is_dataclass(cls) or not isinstance(values, dict):
        return
    hints = _type_hints(cls)
    for key, value in values.items():
        if key not in hints:
            raise OuroborosError(f"{where}: unknown key {key!r}{nearest(key, hints)}")
        for candidate in (hints[key], *typing.get_args(hints[key])):
            if dataclasses.is_dataclass(candidate):
                _refuse_unknown_keys(candidate, value, f"{where}.{key}")
