"""The plain twin of a looped recipe: the control arm of every claim about looping."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ouroboros.accounting import OWN_LOOPS, cost, training_flops
from ouroboros.config import LoopTraining, ModelSpec, Recipe
from ouroboros.errors import check

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
    schedule = recipe.model.schedule
    blocks = schedule.num_blocks if match == "parameters" else schedule.num_visits
    # What only blocks with overrides read would be a dead weight of the twin.
    stem = tuple(p for p in recipe.model.stem if not p.provides or p.provides in recipe.model.block.mixer.reads)
    block = recipe.model.block
    block = dataclasses.replace(block, mixer=block.mixer.unlooped, ffn=block.ffn.unlooped)
    plain = dataclasses.replace(recipe.model, layout=str(blocks), block=block, loop=(), overrides=(), stem=stem)
    if match != "depth":
        context = (recipe.data.sequence_length + 1) // 2
        size = recipe.model if match == "parameters" else training_flops(recipe.model, recipe.train.loops, context)
        plain = equal_size(plain, size, match, context, name=f"plain twin of layout {recipe.model.layout!r}")
    return dataclasses.replace(
        recipe,
        name=f"{recipe.name}-twin",
        description=f"plain twin of {recipe.name}: equal {match}",
        model=plain,
        train=dataclasses.replace(recipe.train, loops=LoopTraining()),
    )


def measure(model: ModelSpec, match: Match, context: int, loops: LoopTraining = OWN_LOOPS) -> int:
    """Stored parameters, or operations per training token that attends to ``context`` positions."""
    return cost(model).parameters if match == "parameters" else training_flops(model, loops, context)


def equal_size(
    spec: ModelSpec,
    target: ModelSpec | int,
    match: Match = "parameters",
    context: int = 1,
    *,
    loops: LoopTraining = OWN_LOOPS,
    name: str = "such model",
) -> ModelSpec:
    """``spec`` with the feed-forward width that brings it closest to ``target``.

    Args:
        spec: any model with a feed-forward network.
        target: the model to equal, or how much it has of that.
        match: in stored ``parameters``, or in training operations per token.
        context: attended positions, for the operations.
        loops: how the model is trained, for the operations.
        name: what an error calls the model.

    Raises:
        OuroborosError: no width comes within 1 %.
    """

    def with_width(width: int) -> ModelSpec:
        return spec.replace(ffn=spec.block.ffn.replace(intermediate_size=width))

    check(
        hasattr(spec.block.ffn, "intermediate_size"),
        f"no {name}: its blocks have no feed-forward network (ffn.kind {spec.block.ffn.kind}) whose width could be"
        " chosen",
    )
    one, two = (measure(with_width(width), match, context, loops) for width in (1, 2))
    wanted = target if isinstance(target, int) else measure(target, match, context, loops)
    width = max(1, 1 + round((wanted - one) / (two - one)))
    found = measure(with_width(width), match, context, loops)
    check(
        width > 1 and abs(found / wanted - 1) <= 0.01,
        f"no {name} has equal {match} within 1 %:"
        f" the closest, with ffn.intermediate_size {width}, has {found:,} for {wanted:,}",
    )
    return with_width(width)
