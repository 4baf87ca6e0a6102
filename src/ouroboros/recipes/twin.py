"""The plain twin of a looped recipe: the control arm of every claim about looping."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ouroboros.accounting import cost
from ouroboros.config import LoopSpec, LoopTraining, ModelSpec, Recipe
from ouroboros.errors import OuroborosError
from ouroboros.schedule import parse

Match = Literal["parameters", "flops", "depth"]


def twin(recipe: Recipe, match: Match = "parameters") -> Recipe:
    """The recipe with every block used once and no loop parts, everything else the same.

    Args:
        recipe: a looped recipe.
        match: ``parameters``: as many blocks as are stored, and the same number of stored parameters.
            ``flops``: as many blocks as there are visits, and the same training operations per token.
            ``depth``: as many blocks as there are visits, and nothing else changed.
            The first two adjust ``ffn.intermediate_size`` for what the loop parts cost.

    Raises:
        OuroborosError: no size of the feed-forward network comes within 1 % of the target.
    """
    schedule = parse(recipe.model.layout)
    blocks = schedule.num_blocks if match == "parameters" else schedule.num_visits
    plain = dataclasses.replace(recipe.model, layout=str(blocks), loop=LoopSpec())
    if match != "depth":
        context = (recipe.data.sequence_length + 1) // 2
        plain = _solve(plain, recipe.model, match, context)
    return dataclasses.replace(
        recipe,
        name=f"{recipe.name}-twin",
        description=f"plain twin of {recipe.name}: equal {match}",
        model=plain,
        train=dataclasses.replace(recipe.train, loops=LoopTraining()),
    )


def _solve(plain: ModelSpec, looped: ModelSpec, match: Match, context: int) -> ModelSpec:
    """``plain`` with the feed-forward width that comes closest to the target."""

    def measure(spec: ModelSpec) -> int:
        found = cost(spec, context=context)
        return found.parameters if match == "parameters" else found.training_flops_per_token

    def with_width(width: int) -> ModelSpec:
        return dataclasses.replace(plain, ffn=dataclasses.replace(plain.ffn, intermediate_size=width))

    target = measure(looped)
    slope = measure(with_width(2)) - measure(with_width(1))
    start = measure(with_width(1))
    width = max(1, 1 + round((target - start) / slope))
    chosen = with_width(width)
    if width == 1 or abs(measure(chosen) / target - 1) > 0.01:
        raise OuroborosError(
            f"no plain twin of layout {looped.layout!r} has equal {match} within 1 %:"
            f" the closest, with ffn.intermediate_size {width}, has {measure(chosen):,} for {target:,}"
        )
    return chosen
