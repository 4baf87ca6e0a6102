"""What an arm changes: the fields in which two recipes differ, and a recipe with some fields changed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from ouroboros.config import ModelSpec, Recipe, fields_by_path, from_dict, to_dict
from ouroboros.config.codec import type_hints
from ouroboros.config.part import is_family, kinds
from ouroboros.errors import OuroborosError, check, nearest

LABELS = ("name", "description")
"""Fields of a recipe that name it and change nothing."""


def unnamed(recipe: Recipe) -> Recipe:
    """The recipe without what only names it."""
    return dataclasses.replace(recipe, name="", description="")


def fingerprint(recipe: Recipe) -> str:
    """sha256 (hex) of all that a recipe says besides its name and description."""
    return fingerprint_of(to_dict(recipe))


def fingerprint_of(values: Mapping[str, Any]) -> str:
    """The same from a recipe's values, which may be of another release and lack fields or have other ones."""
    values = {**values, **dict.fromkeys(LABELS, "")}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def differences(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """The fields in which two recipes differ by dotted path, each with the old and the new value; names aside.

    A part that another one replaces is one difference, ``model.block.residual`` for example, and so is a part that is
    added to a list or taken out of it, ``model.loop.gate``; what follows from that is not listed.
    """
    before, after = fields_by_path(unnamed(old)), fields_by_path(unnamed(new))
    paths = [path for path in {**before, **after} if before.get(path) != after.get(path)]
    # A list of parts that is empty stands for itself and says no more than the parts that come or go.
    paths = [path for path in paths if not any(other.startswith(f"{path}.") for other in paths)]
    parts = [path.removesuffix(".kind") for path in paths if path.endswith(".kind")]
    found: dict[str, tuple[Any, Any]] = {}
    for path in paths:
        part = next((part for part in parts if path.startswith(f"{part}.")), None)
        if part is None:
            found[path] = before.get(path), after.get(path)
        else:
            found[part] = before.get(f"{part}.kind"), after.get(f"{part}.kind")
    if not found and list(before) != list(after):  # parts in a list act in its order
        return {"model": ("parts in this order", "parts in another order")}
    return found


def covered(path: str, declared: Iterable[str]) -> bool:
    """Whether ``path`` is one of the declared paths, or lies below one."""
    return any(path == other or path.startswith(f"{other}.") for other in declared)


def is_field(path: str, *recipes: Recipe) -> bool:
    """Whether one of the recipes has a field, or fields, at this path."""
    return any(covered(field, [path]) for recipe in recipes for field in fields_by_path(recipe))


def changed(recipe: Recipe, changes: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """``recipe`` with some fields changed.

    >>> changed(Recipe(name="a"), {"optim.lr": 0.01, "model.block.ffn.activation": "silu"}).optim.lr
    0.01

    Args:
        recipe: it stays as it is.
        changes: values by dotted path, as ``fields_by_path`` names them. A part of a list is named by its kind
            (``model.loop.gate.bias``); a whole part is a mapping of its options, with its ``kind`` where it replaces
            another one (``{"model.block.residual": {"kind": "delta"}}``), and None takes a part out of a list.
        where: what an error calls the recipe.

    Raises:
        OuroborosError: an unknown field or part (the nearest one is named), or a value that it refuses.
    """
    values = to_dict(recipe)
    for path, value in changes.items():
        _set(values, path, value, where)
    return from_dict(Recipe, values, where=where)


def _set(values: dict[str, Any], path: str, value: Any, where: str) -> None:
    *parents, last = path.split(".")
    inner: Any = values
    for number, name in enumerate(parents):
        known = {part["kind"]: part for part in inner} if isinstance(inner, list) else inner
        if not isinstance(known, dict) or name not in known:
            _unknown(path, name, known, parents[:number], where)
        inner = known[name]
    if isinstance(inner, list):
        _set_part(inner, parents[-1], last, value, where)
    elif isinstance(inner, dict) and last in inner:
        inner[last] = value
    else:
        _unknown(path, last, inner, parents, where)


def _unknown(path: str, name: str, known: Any, parents: list[str], where: str) -> None:
    names = known if isinstance(known, dict) else ()
    before = "".join(f"{parent}." for parent in parents)
    hint = nearest(f"{before}{name}", [f"{before}{other}" for other in names])
    raise OuroborosError(f"{where}: unknown field {path!r}{hint}")


def _set_part(parts: list[dict[str, Any]], field: str, kind: str, options: Any, where: str) -> None:
    """Change a part of the list ``field`` of a model, take it out, or put it where the registry's order has it."""
    family = type_hints(ModelSpec).get(field)
    family = next((member for member in getattr(family, "__args__", ()) if is_family(member)), None)
    order = list(kinds(family)) if family is not None else []
    if kind not in order:
        raise OuroborosError(f"{where}: unknown part {kind!r} of model.{field}{nearest(kind, order)}")
    check(
        options is None or isinstance(options, Mapping),
        f"{where}: model.{field}.{kind} is a part: give a mapping of its options, or None to take it out",
    )
    at = next((number for number, part in enumerate(parts) if part["kind"] == kind), None)
    if at is not None:
        parts[at : at + 1] = [] if options is None else [{**parts[at], **options}]
    elif options is not None:
        later = (number for number, part in enumerate(parts) if order.index(part["kind"]) > order.index(kind))
        parts.insert(next(later, len(parts)), {"kind": kind, **options})
