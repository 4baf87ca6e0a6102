"""Studies that come with the library, by name; ``ouroboros ablate NAME`` runs them on any text."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ouroboros.ablate.study import Arm, Gate, Stage, Study
from ouroboros.recipes import recipe


def loops() -> Study:
    """How many loops pay, at equal stored parameters and equal text."""
    control = Arm(name="loops-4", recipe=recipe("loop", "tiny"))
    layout = control.recipe.model.schedule
    arms = [
        Arm.changing(control, f"loops-{count}", {"model.layout": layout.with_loops(count).notation})
        for count in (1, 2, 4, 8)
        if count != layout.loops
    ]
    control = Arm(name=f"loops-{layout.loops}", recipe=control.recipe)
    return Study(
        name="loops",
        question="How many loops pay, at equal stored parameters and equal text?",
        control=control,
        arms=tuple(arms),
        seeds=(1, 2, 3),
        stages=(
            Stage(name="short", steps=200, seeds=(11, 12), split="valid", gate=Gate(best=2)),
            Stage(name="long", steps=1000),
        ),
    )


STUDIES: Mapping[str, Callable[[], Study]] = {"loops": loops}
