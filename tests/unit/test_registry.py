"""Systems are found by their folder or entry point, and what they bring by place and name."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from ouroboros import registry
from ouroboros.errors import OuroborosError
from ouroboros.registry import System, found, load


@pytest.fixture
def installed(monkeypatch):
    """A package beside the library that brings a system."""

    def install(**systems):
        for name, entries in systems.items():
            module = ModuleType(name)
            module.SYSTEM = System(name=name, title=name.title(), entries=entries)
            monkeypatch.setitem(sys.modules, name, module)
        named = [SimpleNamespace(value=name) for name in systems]
        monkeypatch.setattr(registry, "entry_points", lambda group: named if group == "ouroboros.systems" else [])
        registry.systems.cache_clear()

    yield install
    registry.systems.cache_clear()


def test_what_an_installed_package_brings_is_found_by_place_and_imported_on_use(installed):
    installed(toy={"readers": {"toy": "json:loads"}})
    assert registry.systems()["toy"].title == "Toy"
    assert found("readers")["toy"] == "json:loads" and "toy" not in found("sections")
    assert load(found("readers")["toy"])("[1]") == [1]


def test_a_name_belongs_to_one_system(installed):
    installed(one={"readers": {"x": "json:loads"}}, two={"readers": {"x": "json:dumps"}})
    with pytest.raises(OuroborosError, match="system two: readers already has 'x'"):
        found("readers")


@pytest.mark.parametrize(("module", "words"), [("json", "has no SYSTEM"), ("no_such_module", "cannot be imported")])
def test_a_package_that_brings_no_system_is_named(installed, monkeypatch, module, words):
    installed()
    monkeypatch.setattr(registry, "entry_points", lambda group: [SimpleNamespace(value=module)])
    with pytest.raises(OuroborosError, match=f"the entry point '{module}' of the group 'ouroboros.systems' {words}"):
        registry.systems()
