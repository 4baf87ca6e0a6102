"""Recipes: named systems as Python values made of shared parts.

Beside the plain decoder and the looped one, which are here, a recipe is found at the registry's place ``recipes``: the
entry's name is the recipe's, and its attribute a :class:`RecipeEntry`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ouroboros.config import Recipe
from ouroboros.errors import check, nearest
from ouroboros.recipes.gpt import gpt
from ouroboros.recipes.loop import loop, loop_long, loop_portable
from ouroboros.registry import found, load

SIZES = ("tiny", "small", "base")
"""Sizes every recipe has; for a system with published presets they name the nearest of those."""


@dataclass(frozen=True, kw_only=True)
class RecipeEntry:
    """A recipe in all of its sizes."""

    make: Callable[[str], Recipe]
    """The recipe at one of :attr:`sizes`."""
    sizes: tuple[str, ...] = SIZES
    """Smallest first."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Those of :data:`SIZES` that :attr:`sizes` lacks, and which one each of them stands for."""
    presets: tuple[tuple[str, float], ...] = ()
    """Where the hardware chooses the size unless one is named: the sizes, largest first, each with the GB of CUDA
    memory that it needs. The last one needs none and serves without CUDA."""


_SHIPPED = {
    "gpt": RecipeEntry(make=gpt),
    "loop": RecipeEntry(make=loop),
    "loop-long": RecipeEntry(make=loop_long),
    "loop-portable": RecipeEntry(make=loop_portable),
}


def _names() -> tuple[str, ...]:
    return (*_SHIPPED, *found("recipes"))


def _entry(name: str) -> RecipeEntry:
    if name in _SHIPPED:
        return _SHIPPED[name]
    check(name in _names(), f"unknown recipe {name!r}{nearest(name, _names())}")
    return load(found("recipes")[name])


def sizes(name: str) -> tuple[str, ...]:
    """The sizes of the recipe ``name``, smallest first, under the names it lists."""
    return _entry(name).sizes


def presets(name: str) -> tuple[tuple[str, float], ...]:
    """The sizes from which the hardware chooses, see :attr:`RecipeEntry.presets`; empty if it does not."""
    return _entry(name).presets


def recipe(name: str, size: str = "small") -> Recipe:
    """The recipe ``name`` at ``size``: tiny, small, base or a preset of its own (:func:`sizes`).

    Raises:
        OuroborosError: unknown name or size; the nearest one is offered.
    """
    entry = _entry(name)
    chosen = size if size in entry.sizes else entry.aliases.get(size, size)
    check(chosen in entry.sizes, f"unknown size {size!r}{nearest(size, (*entry.sizes, *SIZES))}")
    return entry.make(chosen)


RECIPES: Mapping[str, Recipe]
"""Every recipe at size ``small``, by name."""


def __getattr__(name: str) -> Mapping[str, Recipe]:
    """:data:`RECIPES`, made when it is asked for: a system's recipe builds on what is defined here."""
    if name == "RECIPES":
        return _all(_names())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _all(names: tuple[str, ...]) -> Mapping[str, Recipe]:
    return {name: recipe(name) for name in names}
