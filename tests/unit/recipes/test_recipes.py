"""The list of recipes: its order, sizes under several names, and recipes that a system brings."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType, SimpleNamespace

import pytest

from ouroboros import recipes, registry
from ouroboros.config import Recipe
from ouroboros.errors import OuroborosError
from ouroboros.recipes import RECIPES, RecipeEntry, presets, recipe, sizes
from ouroboros.recipes.gpt import gpt


def named(size: str) -> Recipe:
    return dataclasses.replace(gpt("tiny"), name="toy", description=size)


@pytest.fixture
def toy(monkeypatch):
    """A system beside the library with one recipe."""
    module = ModuleType("toy_system")
    module.TOY = RecipeEntry(
        make=named, sizes=("mini", "maxi"), aliases={"small": "mini", "base": "maxi"}, presets=(("maxi", 0.0),)
    )
    module.SYSTEM = registry.System(name="toy", title="Toy", entries={"recipes": {"toy": "toy_system:TOY"}})
    monkeypatch.setitem(sys.modules, "toy_system", module)
    monkeypatch.setattr(registry, "entry_points", lambda group: [SimpleNamespace(value="toy_system")])
    registry.systems.cache_clear()
    yield
    registry.systems.cache_clear()


def test_the_plain_and_the_looped_decoder_come_first():
    assert list(RECIPES)[:2] == ["gpt", "loop"] and len(RECIPES) == len(set(RECIPES))
    assert all(value.name == name for name, value in RECIPES.items())
    with pytest.raises(AttributeError, match="no attribute 'NOTHING'"):
        _ = recipes.NOTHING
    with pytest.raises(OuroborosError, match=r"unknown recipe 'lop'; did you mean 'loop'\?"):
        recipe("lop")


def test_a_system_brings_its_recipes_in_its_own_sizes(toy):
    assert list(recipes.RECIPES)[-1] == "toy" and recipes.RECIPES["toy"].description == "mini"
    assert sizes("toy") == ("mini", "maxi") and presets("toy") == (("maxi", 0.0),)
    assert recipe("toy", "base") == recipe("toy", "maxi")
    with pytest.raises(OuroborosError, match=r"unknown size 'maxy'; did you mean 'maxi'\?"):
        recipe("toy", "maxy")
    with pytest.raises(OuroborosError, match="unknown size 'tiny'"):
        recipe("toy", "tiny")
