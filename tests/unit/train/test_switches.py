"""The trainer itself shows what each option of optimiser and training changes. That every option acts somewhere is in
tests/unit/config/test_every_option.py."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from ouroboros.config import AttentionSpec, FeedForwardSpec, LoopTraining, ModelSpec, OptimSpec, Recipe, TrainSpec
from ouroboros.eval.switches import Switch
from ouroboros.train.switches import training_switches

TINY = Recipe(
    name="tiny",
    model=ModelSpec(layout="(1)x2", hidden_size=8).replace(
        mixer=AttentionSpec(num_heads=2), ffn=FeedForwardSpec(intermediate_size=8)
    ),
    optim=OptimSpec(clip_norm=0.5, scalar_lr=0.1),
    train=TrainSpec(minutes=5, loops=LoopTraining(sampling="poisson")),
)


def named(recipe: Recipe) -> dict[str, Switch]:
    return {switch.name: switch for switch in training_switches(recipe)}


def test_switches_of_training(caplog: pytest.LogCaptureFixture) -> None:
    state, level = torch.random.get_rng_state(), logging.getLogger("ouroboros").level
    found = named(TINY)
    acting = {name for name, switch in found.items() if switch.acts}
    assert acting >= {"optim.clip_norm", "optim.eps", "optim.warmup_fraction", "train.ema_decay", "train.loops.mean"}
    assert found["train.threads"].why == "declared: it changes memory or time, and numbers by rounding alone"
    assert found["optim.start_lr"].why == "needs schedule = one_cycle"
    dead = {name: switch.why for name, switch in found.items() if switch.dead}
    assert dead == {"optim.scalar_lr": "needs a parameter of role scalar, but is set"}
    every = [f"{name}.{field.name}" for name in ("optim", "train") for field in dataclasses.fields(getattr(TINY, name))]
    assert {".".join(name.split(".")[:2]) for name in found} == set(every)
    assert torch.equal(torch.random.get_rng_state(), state) and logging.getLogger("ouroboros").level == level


def test_an_option_without_effect_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ouroboros.train.trainer.clip_and_norm", lambda parameters, limit: 1.0)
    assert named(TINY)["optim.clip_norm"].dead
