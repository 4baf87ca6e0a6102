"""What a study refuses, and which arms its gates let through."""

import dataclasses

import pytest

from ouroboros.ablate.changes import changed
from ouroboros.ablate.study import Arm, Gate, Packing, Stage
from ouroboros.errors import OuroborosError


def arm(study, name, changes, declared=()):
    return Arm(name=name, recipe=changed(study.control.recipe, changes), changes=declared)


SEVERAL = {"optim.lr": 0.5, "train.batch_size": 4}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (lambda s: {"arms": (s.arms[0], s.arms[0])}, "two arms are called 'lr'; rename one"),
        (lambda s: {"arms": (arm(s, "same", {}),)}, "arm 'same': equals the control 'control'"),
        (lambda s: {"arms": (arm(s, "seed", {"train.seed": 9}),)}, "arm 'seed': equals the control"),
        (lambda s: {"arms": (arm(s, "steps", {"train.steps": 9}),)}, "arm 'steps': equals the control"),
        (lambda s: {"arms": (*s.arms, arm(s, "b", {"optim.lr": 0.02}))}, "arms 'lr' and 'b' are the same"),
        (lambda s: {"arms": (arm(s, "b", SEVERAL),)}, "changes optim.lr, train.batch_size, which are several things"),
        (lambda s: {"arms": (arm(s, "b", SEVERAL, ("optim",)),)}, "changes train.batch_size beside what it declares"),
        (lambda s: {"arms": (arm(s, "b", {"optim.lr": 1.0}, ("optim.l",)),)}, "unknown field 'optim.l'; did you mean"),
        (
            lambda s: {"arms": (arm(s, "b", {"optim.lr": 1.0}, ("optim.betas",)),)},
            "declares optim.betas, which it leav",
        ),
        (lambda s: {"arms": ()}, "has no arms"),
        (lambda s: {"seeds": ()}, "no seeds"),
        (lambda s: {"seeds": (1, 1)}, "seed 1 is there twice"),
        (lambda s: {"stages": (Stage(name="a"),)}, "stage 'a': no budget"),
        (lambda s: {"stages": (Stage(name="a", steps=1), Stage(name="a", steps=2))}, "two stages are called 'a'"),
        (lambda s: {"name": "a/b"}, "study 'a/b': a name has"),
    ],
)
def test_a_study_that_cannot_answer_is_refused(study_of, fields, words):
    study = study_of()
    with pytest.raises(OuroborosError) as caught:
        dataclasses.replace(study, **fields(study))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Stage(name="a", steps=1, tokens=2), "give one of steps, tokens and minutes, not steps and tokens"),
        (lambda: Stage(name="a", minutes=0), "minutes must be > 0"),
        (lambda: Gate(), "gate: says nothing"),
        (lambda: Gate(best=0), "gate.best must be >= 1"),
        (lambda: Packing(), "give one of bits and budget"),
        (lambda: Packing(bits=9), "packing.bits must be 2 to 8"),
    ],
)
def test_values_out_of_range_are_refused(make, words):
    with pytest.raises(OuroborosError, match=words):
        make()


def test_several_changes_are_allowed_where_they_are_declared(study_of):
    study = study_of()
    both = arm(study, "both", SEVERAL, ("optim.lr", "train.batch_size"))
    assert dataclasses.replace(study, arms=(both,)).arms == (both,)
    wide = arm(study, "wide", {"model.hidden_size": 32, "model.block.ffn.intermediate_size": 48}, ("model",))
    assert dataclasses.replace(study, arms=(wide,)).arms == (wide,)


def test_repeats_are_the_control_once_more(study_of):
    names = [arm.name for arm in study_of(repeats=2).every_arm]
    assert names == ["control", "lr", "control-again-1", "control-again-2"]


def test_a_gate_promotes_by_the_rule_it_states():
    found = {"a": -0.02, "b": 0.01, "c": -0.01}
    assert Gate(best=2).passing(found) == ["a", "c"] and Gate(at_most=-0.015).passing(found) == ["a"]
    assert Gate(best=1, at_most=-0.1).passing(found) == []
    assert Gate(best=2, at_most=0.0).describe() == (
        "promoted: the best 2 with a difference of at most +0 bits per byte"
    )


def test_a_stage_gives_every_run_its_budget_and_seed(study_of):
    recipe = changed(study_of().control.recipe, {"train.minutes": 3.0})
    assert Stage(name="a", steps=5).recipe(recipe, 7).train == dataclasses.replace(
        recipe.train, steps=5, minutes=None, seed=7
    )
    assert Stage(name="a").recipe(recipe, 7).train.minutes == 3.0
