"""The input-conditioned recursion Controller of Ouroboros, arXiv 2604.02051 (docs/systems/controller.md)."""

from __future__ import annotations

import ouroboros.systems.controller.parts  # noqa: F401  registers what only the first generation has
from ouroboros.registry import System

SYSTEM = System(
    name="controller",
    title="the Controller",
    entries={
        "recipes": {
            "controller": "ouroboros.systems.controller.recipe:CONTROLLER",
            "controller-published": "ouroboros.systems.controller.recipe:CONTROLLER_PUBLISHED",
            "controller-first": "ouroboros.systems.controller.recipe_first:CONTROLLER_FIRST",
            "controller-first-published": "ouroboros.systems.controller.recipe_first:CONTROLLER_FIRST_PUBLISHED",
        },
        "readers": {"controller": "ouroboros.systems.controller.reader:READER"},
    },
)
