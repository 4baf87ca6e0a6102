"""Specifications as JSON, and back, strictly."""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Iterator
from typing import Any, TypeVar

from ouroboros.errors import OuroborosError, check, nearest

T = TypeVar("T")


def to_dict(spec: Any) -> dict[str, Any]:
    """The specification as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(spec)))


def to_json(spec: Any) -> str:
    """The specification as indented JSON text."""
    return json.dumps(to_dict(spec), indent=2) + "\n"


def fields_by_path(spec: Any) -> dict[str, Any]:
    """Every field that is no specification itself, as a plain JSON value by its dotted path."""

    def flatten(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from flatten(inner, f"{prefix}.{key}" if prefix else key)
        else:
            yield prefix, value

    return dict(flatten(to_dict(spec), ""))


def from_dict(cls: type[T], values: dict[str, Any], *, where: str = "") -> T:
    """Read ``values`` as ``cls``, strictly.

    Raises:
        OuroborosError: an unknown key (the nearest valid one is offered), a wrong type, a bad value.
    """
    from pydantic import ValidationError

    values = _known(cls, values, where or cls.__name__)
    try:
        return _adapter(cls).validate_python(values)
    except ValidationError as error:
        first = next(e for e in error.errors() if _is_meant(e["loc"], values))
        place = ".".join(str(part) for part in first["loc"] if part not in _union_members())
        message = first["msg"].removeprefix("Value error, ")
        raise OuroborosError(f"{where or cls.__name__}: {place + ': ' if place else ''}{message}") from None


def _union_members() -> dict[str, Any]:
    """The classes a field may choose from by ``kind``, by name: pydantic names them within the place of an error."""
    from ouroboros.config.mixers import MixerSpec

    return {c.__name__: c for c in typing.get_args(MixerSpec)}


def _is_meant(place: tuple[int | str, ...], values: Any) -> bool:
    """Whether an error belongs to the class that ``values`` chose by ``kind``, not to another one of the union."""
    members = _union_members()
    for part in place:
        if part in members:
            kind = members[str(part)].__dataclass_fields__["kind"].default
            return not isinstance(values, dict) or values["kind"] == kind
        values = values.get(part) if isinstance(values, dict) else None
    return True


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


def _known(cls: Any, values: Any, where: str) -> Any:
    """``values`` with the ``kind`` of every choice filled in; keys that nested dataclasses do not have are refused."""
    if not dataclasses.is_dataclass(cls) or not isinstance(values, dict):
        return values
    hints, found = _type_hints(cls), {}
    for key, value in values.items():
        if key not in hints:
            raise OuroborosError(f"{where}: unknown key {key!r}{nearest(key, hints)}")
        candidate = _dataclass_for(hints[key], value, f"{where}.{key}")
        found[key] = value if candidate is None else _known(candidate, value, f"{where}.{key}")
    if "kind" in hints and "kind" not in found:
        found["kind"] = cls.__dataclass_fields__["kind"].default
    return found


def _dataclass_for(hint: Any, value: Any, where: str) -> Any:
    """The dataclass that ``value`` is to be read as: the only one ``hint`` allows, or the one of its ``kind``."""
    classes = [c for c in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(c)]
    if len(classes) < 2 or not isinstance(value, dict):
        return classes[0] if classes else None
    kinds = {c.__dataclass_fields__["kind"].default: c for c in classes}
    kind = value.get("kind", next(iter(kinds)))  # the first is the default
    if kind not in kinds:
        raise OuroborosError(f"{where}.kind: unknown kind {kind!r}{nearest(str(kind), kinds)}")
    return kinds[kind]
