"""Published styles: found by the model's specification, in what every system enters."""

import pytest

from ouroboros.config import ModelSpec
from ouroboros.errors import OuroborosError
from ouroboros.recipes import RECIPES
from ouroboros.registry import found, load
from ouroboros.serve import styles
from ouroboros.serve.sampling import Sampling
from ouroboros.serve.styles import PLACE, Style, published_sampling


def test_a_style_is_that_of_the_system_which_recognises_the_model(monkeypatch):
    entries = {
        "wide": Style(recognises=lambda model: model.hidden_size > 100, sampling=Sampling(top_k=1)),
        "narrow": Style(recognises=lambda model: model.hidden_size == 16, sampling=Sampling(top_k=2)),
    }
    monkeypatch.setattr(styles, "found", lambda place: {name: name for name in entries if place == PLACE})
    monkeypatch.setattr(styles, "load", entries.__getitem__)
    assert published_sampling(ModelSpec(hidden_size=16)) == Sampling(top_k=2)
    with pytest.raises(OuroborosError, match=r"of no system that has a published style \(wide, narrow\); leave it out"):
        published_sampling(ModelSpec(hidden_size=32))


def test_every_entry_is_a_style_and_no_model_has_two():
    entries = [load(target) for target in found(PLACE).values()]
    assert entries and all(isinstance(entry, Style) for entry in entries)
    for value in RECIPES.values():
        assert sum(entry.recognises(value.model) for entry in entries) <= 1, value.name
