"""What the library finds by name instead of by import: what a published system brings, built in or installed beside it.

A system is a module with a constant ``SYSTEM``: a folder of :mod:`ouroboros.systems`, or what an installed package
names as an entry point of the group ``ouroboros.systems``. No other module of the library names it: whoever offers a
place to extend asks :func:`found` for the entries of that place.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from ouroboros.errors import OuroborosError, check


@dataclass(frozen=True, kw_only=True)
class System:
    """A published system. Its module imports no torch: everything is named, and imported on first use."""

    name: str
    """The folder's name, short and lower case."""
    title: str
    """The name its authors gave it, for people."""
    entries: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By place (``recipes``, ``readers``, ``sources``, ``sections``, ...) and name: ``module:attribute``. What is
    expected of the attribute stands where the place is offered."""


@functools.cache
def systems() -> dict[str, System]:
    """Every system by name, in alphabetical order.

    Raises:
        OuroborosError: an installed package names a module that cannot be imported or has no ``SYSTEM``.
    """
    from ouroboros import systems as folder

    own = [f"{folder.__name__}.{module.name}" for module in pkgutil.iter_modules(folder.__path__)]
    installed = [entry.value for entry in entry_points(group=folder.__name__)]
    return {system.name: system for system in map(_system, sorted([*own, *installed]))}


def _system(module: str) -> System:
    where = f"the entry point {module!r} of the group 'ouroboros.systems'"
    try:
        system = getattr(importlib.import_module(module), "SYSTEM", None)
    except ImportError as error:
        raise OuroborosError(f"{where} cannot be imported: {error}; reinstall or remove the package") from error
    if not isinstance(system, System):
        raise OuroborosError(f"{where} has no SYSTEM = ouroboros.registry.System(...)")
    return system


def found(place: str) -> dict[str, str]:
    """The entries of ``place``, of all systems: name and ``module:attribute``.

    Raises:
        OuroborosError: two systems claim one name.
    """
    entries: dict[str, str] = {}
    for system in systems().values():
        for name, target in system.entries.get(place, {}).items():
            check(name not in entries, f"system {system.name}: {place} already has {name!r}")
            entries[name] = target
    return entries


def load(target: str) -> Any:
    """The attribute that ``module:attribute`` names."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
