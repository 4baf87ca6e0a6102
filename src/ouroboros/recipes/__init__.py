"""Recipes: each published or shipped system as a Python value made of shared parts."""

from __future__ import annotations

from collections.abc import Callable

from ouroboros.config import Recipe
from ouroboros.errors import OuroborosError, nearest
from ouroboros.recipes.gpt import gpt
from ouroboros.recipes.loop import loop

SIZES = ("tiny", "small", "base")

_MAKERS: dict[str, Callable[[str], Recipe]] = {"gpt": gpt, "loop": loop}

RECIPES: dict[str, Recipe] = {name: make("small") for name, make in _MAKERS.items()}
"""Every recipe at size ``small``, by name."""


def recipe(name: str, size: str = "small") -> Recipe:
    """The recipe ``name`` at ``size`` (tiny, small or base).

    Raises:
        OuroborosError: unknown name or size; the nearest one is offered.
    """
    if name not in _MAKERS:
        raise OuroborosError(f"unknown recipe {name!r}{nearest(name, _MAKERS)}")
    if size not in SIZES:
        raise OuroborosError(f"unknown size {size!r}{nearest(size, SIZES)}")
    return _MAKERS[name](size)
