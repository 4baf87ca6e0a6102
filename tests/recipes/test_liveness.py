"""Every optional part switched on is alive: its parameters act, have a gradient and move."""

from __future__ import annotations

import pytest
from variants import BASE, VARIANTS

from ouroboros.config import AttentionSpec, ModelSpec, Recipe
from ouroboros.eval.liveness import parameter_lives

SLEEPING = {
    "choke pyramid, tap of the deepest": "three squares in a row leave so narrow a model gradients that the optimiser"
    " takes for nothing",
}
"""Variants of which some parameters do not move within ten steps, and why."""


def switched_on(spec: ModelSpec) -> bool:
    """Whether it has parts that no plain model has."""
    plain = {part.kind for part in BASE.parts} | {AttentionSpec().kind}
    return bool({part.kind for part in spec.parts} - plain)


@pytest.mark.parametrize("name", [name for name, spec in VARIANTS.items() if switched_on(spec)])
def test_every_parameter_of_a_variant_is_alive(name: str) -> None:
    lives = parameter_lives(Recipe(name="variant", model=VARIANTS[name]))
    dead = {life.name: life.why for life in lives if life.dead}
    assert bool(dead) == (name in SLEEPING), dead
