"""Recipes: each published or shipped system as a Python value made of shared parts."""

from __future__ import annotations

from collections.abc import Callable

from ouroboros.config import Recipe
from ouroboros.errors import OuroborosError, nearest
from ouroboros.recipes import delta as _delta
from ouroboros.recipes import osam as _osam
from ouroboros.recipes import rhrm as _rhrm
from ouroboros.recipes.gpt import gpt
from ouroboros.recipes.loop import loop

SIZES = ("tiny", "small", "base")
"""Sizes every recipe has; for a system with published presets they name the nearest of those."""

_MAKERS: dict[str, Callable[[str], Recipe]] = {
    "gpt": gpt,
    "loop": loop,
    "delta": _delta.delta,
    "delta-published": _delta.delta_published,
    "osam": _osam.osam,
    "osam-published": _osam.osam_published,
    "rhrm": _rhrm.rhrm,
    "rhrm-published": _rhrm.rhrm_published,
}
_OWN_SIZES: dict[str, tuple[str, ...]] = {
    "delta": _delta.SIZES,
    "delta-published": _delta.SIZES,
    "osam-published": _osam.PUBLISHED_SIZES,
    "rhrm": _rhrm.SIZES,
    "rhrm-published": _rhrm.SIZES,
}
_DELTA_ALIASES, _RHRM_ALIASES = {"base": "published"}, {"small": "lite", "base": "pro"}
_ALIASES: dict[str, dict[str, str]] = {
    "delta": _DELTA_ALIASES,
    "delta-published": _DELTA_ALIASES,
    "osam-published": {"small": "default", "base": "quick-start"},
    "rhrm": _RHRM_ALIASES,
    "rhrm-published": _RHRM_ALIASES,
}
"""Sizes of the contract, for recipes whose presets have names of their own."""

PRESETS: dict[str, tuple[tuple[str, float], ...]] = {"rhrm": _rhrm.PRESETS, "rhrm-published": _rhrm.PRESETS}
"""Recipes whose size is chosen by the hardware unless it is named: (size, GB of CUDA memory needed), largest first; the
last one serves without CUDA."""


def sizes(name: str) -> tuple[str, ...]:
    """The sizes of the recipe ``name``, smallest first, under the names it lists."""
    return _OWN_SIZES.get(name, SIZES)


def recipe(name: str, size: str = "small") -> Recipe:
    """The recipe ``name`` at ``size``: tiny, small, base or a preset of its own (:func:`sizes`).

    Raises:
        OuroborosError: unknown name or size; the nearest one is offered.
    """
    if name not in _MAKERS:
        raise OuroborosError(f"unknown recipe {name!r}{nearest(name, _MAKERS)}")
    own = sizes(name)
    chosen = size if size in own else _ALIASES.get(name, {}).get(size, size)
    if chosen not in own:
        raise OuroborosError(f"unknown size {size!r}{nearest(size, (*own, *SIZES))}")
    return _MAKERS[name](chosen)


RECIPES: dict[str, Recipe] = {name: recipe(name) for name in _MAKERS}
"""Every recipe at size ``small``, by name."""
