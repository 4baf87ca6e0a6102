"""Options that another option switches on, declared beside the field: ``field(default=..., metadata=needs(...))``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

NEEDS = "needs"
UNTRIED = "untried"


def needs(path: str, *values: Any, say: str | None = None) -> dict[str, Any]:
    """Metadata of a field that changes something only where the option at ``path`` has one of ``values``.

    Args:
        path: dotted, within the same specification; one that begins with ``/`` starts at the recipe, and is met where
            there is no recipe around.
        values: of that option; a function is asked with the option's value, and its docstring says what is needed.
            Without any, every value does that is not off: off are false, zero, null and the empty list.
        say: what a message says is needed, instead of the option and its values.
    """
    return {NEEDS: ((path, values, say),)}


def all_of(*declared: dict[str, Any]) -> dict[str, Any]:
    """Metadata of a field that needs several options at once."""
    return {NEEDS: tuple(need for one in declared for need in one[NEEDS])}


def untried(why: str) -> dict[str, Any]:
    """Metadata of a field whose effect a short trial may not show, for the liveness proof
    (:mod:`ouroboros.eval.liveness`).

    Args:
        why: what it changes instead, as the end of a sentence about the option.
    """
    return {UNTRIED: why}


def positive(value: Any) -> bool:
    """more than 0"""
    return bool(value) and value > 0


def several(value: Any) -> bool:
    """more than 1"""
    return bool(value) and value > 1


def given(value: Any) -> bool:
    """a value"""
    return value is not None


def idle(spec: Any, prefix: str = "", recipe: Any = None) -> Iterator[tuple[str, str]]:
    """Every option of ``spec``, nested ones included, that changes nothing as the others stand.

    Args:
        spec: a specification, or the whole recipe.
        prefix: of the paths.
        recipe: what paths that begin with ``/`` start at; ``spec`` itself by default.

    Yields:
        The option's dotted path, and the option that would give it an effect with the value it needs.
    """
    recipe = spec if recipe is None else recipe
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        unmet = [need for need in field.metadata.get(NEEDS, ()) if not _met(spec, recipe, *need[:2])]
        if unmet:
            path, values, say = unmet[0]
            where = path[1:] if path.startswith("/") else f"{prefix}{path}"
            why = say or f"{where} = {' or '.join(map(_described, values)) or 'on'}"
            yield from ((name, why) for name in _leaves(value, prefix + field.name))
        elif dataclasses.is_dataclass(value):
            yield from idle(value, f"{prefix}{field.name}.", recipe)
        elif isinstance(value, tuple):
            for item in value:
                if dataclasses.is_dataclass(item):
                    yield from idle(item, f"{prefix}{field.name}.{getattr(item, 'kind', '')}.", recipe)


def declared_untried(spec: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every option of ``spec``, nested ones included, that is declared :func:`untried`: its dotted path and why."""
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if UNTRIED in field.metadata:
            yield prefix + field.name, field.metadata[UNTRIED]
        for item in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(item):
                kind = f"{getattr(item, 'kind', '')}." if isinstance(value, tuple) else ""
                yield from declared_untried(item, f"{prefix}{field.name}.{kind}")


def _met(spec: Any, recipe: Any, path: str, values: tuple[Any, ...]) -> bool:
    first, *rest = path.removeprefix("/").split(".")
    if path.startswith("/") and not hasattr(recipe, first):
        return True
    actual = getattr(recipe if path.startswith("/") else spec, first)
    for name in rest:
        actual = getattr(actual, name)
    if not values:
        return bool(actual)
    return any(value(actual) if isinstance(value, Callable) else value == actual for value in values)


def _described(value: Any) -> str:
    if isinstance(value, Callable):
        return str(value.__doc__)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _leaves(value: Any, name: str) -> Iterator[str]:
    """The paths of all options below ``name``."""
    if not dataclasses.is_dataclass(value):
        yield name
        return
    for field in dataclasses.fields(value):
        yield from _leaves(getattr(value, field.name), f"{name}.{field.name}")
