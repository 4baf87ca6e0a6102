"""Arms that would answer nothing are found before they cost anything."""

import dataclasses

import pytest
import torch

from ouroboros.ablate import alive
from ouroboros.ablate.alive import behaviour, dead_arms, same
from ouroboros.ablate.runner import prepared_text
from ouroboros.errors import OuroborosError


def judged(study, tmp_path, tell=lambda line: None):
    texts = {arm.name: prepared_text(tmp_path, arm.recipe.data)[1] for arm in study.every_arm}
    return dead_arms(study, texts, tmp_path / "alive.json", tell)


def test_an_arm_that_equals_the_control_is_named_and_judged_once(study_of, tmp_path, monkeypatch):
    monkeypatch.setattr(alive, "faults", lambda recipe, data: ())
    changes = {
        "lr": {"optim.lr": 0.02},
        "memory": {"train.activation_checkpointing": True},
        "gate": {"model.loop.gate": {}},
    }
    study, lines = study_of(changes), []
    state = torch.random.get_rng_state()
    found = judged(study, tmp_path, lines.append)
    assert list(found) == ["memory"] and found["memory"].startswith("this arm equals the control 'control'")
    assert len(lines) == 1 and torch.equal(state, torch.random.get_rng_state())
    monkeypatch.setattr(alive, "behaviour", None)
    assert judged(study, tmp_path) == found
    late = tuple(dataclasses.replace(arm, late=arm.name == "memory") for arm in study.arms)
    assert judged(dataclasses.replace(study, arms=late), tmp_path) == {}


def test_dead_parameters_are_named(study_of, tmp_path, monkeypatch):
    study = study_of()
    monkeypatch.setattr(alive, "behaviour", lambda recipe, data: [torch.tensor(recipe.optim.lr)])
    dead = {study.arms[0].recipe.optim.lr: ("parameter model.x: no logit depends on it",)}
    monkeypatch.setattr(alive, "faults", lambda recipe, data: dead.get(recipe.optim.lr, ()))
    assert judged(study, tmp_path) == {"lr": "parameter model.x: no logit depends on it"}
    dead |= {study.control.recipe.optim.lr: ("parameter model.y: 10 steps do not move it",)}
    with pytest.raises(OuroborosError, match="control 'control': is dead in part: parameter model.y"):
        judged(study, tmp_path / "new" if (tmp_path / "new").mkdir() is None else tmp_path)


def test_a_sound_recipe_has_no_faults(small, tmp_path):
    assert alive.faults(small, prepared_text(tmp_path, small.data)[1]) == ()


def test_equal_behaviour_is_equal_but_for_rounding(small, tmp_path):
    data = prepared_text(tmp_path, small.data)[1]
    one = behaviour(small, data)
    assert same(one, [values * (1 + 1e-8) for values in one]) and not same(one, [values * 1.001 for values in one])
