"""Specifications as JSON, and back, strictly."""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Iterator
from typing import Any, TypeVar

from ouroboros.config.part import is_family, kinds
from ouroboros.errors import OuroborosError, check, nearest

T = TypeVar("T")


def to_dict(spec: Any) -> dict[str, Any]:
    """The specification as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(spec)))


def to_json(spec: Any) -> str:
    """The specification as indented JSON text."""
    return json.dumps(to_dict(spec), indent=2) + "\n"


def fields_by_path(spec: Any) -> dict[str, Any]:
    """Every field that is no specification itself, as a plain JSON value by its dotted path; a part in a list is named
    by its kind."""

    def flatten(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, list) and value and all(isinstance(item, dict) and "kind" in item for item in value):
            value = {item["kind"]: item for item in value}
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from flatten(inner, f"{prefix}.{key}" if prefix else key)
        else:
            yield prefix, value

    return dict(flatten(to_dict(spec), ""))


def from_json(cls: type[T], text: str, *, where: str = "") -> T:
    """Read JSON ``text`` as ``cls``; see :func:`from_dict`."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise OuroborosError(f"{where or cls.__name__}: not JSON: {error}") from None
    check(isinstance(values, dict), f"{where or cls.__name__}: expected a JSON object")
    return from_dict(cls, values, where=where)


def from_dict(cls: type[T], values: dict[str, Any], *, where: str = "") -> T:
    """Read ``values`` as ``cls``, strictly; what an earlier version wrote is read as it was meant.

    Raises:
        OuroborosError: an unknown key (the nearest valid one is offered), a wrong type, a bad value.
    """
    return _read_dataclass(cls, values, where or cls.__name__, "")


def _read_dataclass(cls: Any, values: dict[str, Any], where: str, place: str) -> Any:
    values = cls.migrate(values) if hasattr(cls, "migrate") else values
    hints, fields, found = type_hints(cls), {field.name: field for field in dataclasses.fields(cls)}, {}
    for key, value in values.items():
        if key not in fields:
            raise OuroborosError(f"{_at(where, place)}: unknown key {key!r}{nearest(key, fields)}")
        if is_family(hints[key]) and isinstance(value, dict) and "kind" not in value:
            default: Any = fields[key].default_factory
            value = {"kind": default().kind, **value}
        found[key] = _read(hints[key], value, where, f"{place}.{key}" if place else key)
    for name, field in fields.items():
        if name not in found and field.default is field.default_factory is dataclasses.MISSING:
            raise OuroborosError(f"{where}: {place + '.' if place else ''}{name}: Field required")
    try:
        return cls(**found)
    except OuroborosError as error:  # a value out of range
        raise OuroborosError(f"{where}: {place + ': ' if place else ''}{error}") from None


def _read(hint: Any, value: Any, where: str, place: str) -> Any:
    """One value, by the type of its field."""
    arguments = typing.get_args(hint)
    if is_family(hint):
        check(isinstance(value, dict), f"{_at(where, place)}: expected an object with a kind, got {value!r}")
        return _read_dataclass(_member(hint, value, where, place), value, where, place)
    if dataclasses.is_dataclass(hint):
        check(isinstance(value, dict), f"{_at(where, place)}: expected an object, got {value!r}")
        return _read_dataclass(hint, value, where, place)
    if arguments and (is_family(arguments[0]) or dataclasses.is_dataclass(arguments[0])) and Ellipsis in arguments:
        check(isinstance(value, (list, tuple)), f"{_at(where, place)}: expected a list, got {value!r}")
        return tuple(_read(arguments[0], item, where, f"{place}.{index}") for index, item in enumerate(value))
    specs = [choice for choice in arguments if dataclasses.is_dataclass(choice)]
    if specs and isinstance(value, dict):
        return _read_dataclass(specs[0], value, where, place)
    from pydantic import ValidationError

    try:
        return _adapter(hint).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        inner = "".join(f".{part}" for part in first["loc"])
        raise OuroborosError(f"{where}: {place}{inner}: {first['msg']}") from None


def _member(hint: Any, value: dict[str, Any], where: str, place: str) -> Any:
    """The specification of a family that ``value`` chose by ``kind``."""
    members, kind = kinds(hint), value.get("kind")
    if not isinstance(kind, str) or kind not in members:
        raise OuroborosError(f"{_at(where, place)}.kind: unknown kind {kind!r}{nearest(str(kind), members)}")
    return members[kind]


def _at(where: str, place: str) -> str:
    return f"{where}.{place}" if place else where


@functools.cache
def _adapter(hint: Any) -> Any:
    """The validator of a field's type; making one takes milliseconds, and a model reads its specification often."""
    from pydantic import TypeAdapter

    return TypeAdapter(hint)


type_hints = functools.cache(typing.get_type_hints)
"""The types of a specification's fields by name."""
