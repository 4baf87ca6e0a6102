"""The plain models that a looped recipe has to beat: equal in what is scarce, and otherwise as good as they can be."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from ouroboros.ablate.changes import differences
from ouroboros.ablate.study import Arm
from ouroboros.config import ModelSpec, Recipe
from ouroboros.errors import OuroborosError, check
from ouroboros.recipes.twin import equal_size, measure, twin

Size = Literal["parameters", "flops"]
"""What is equal before training; packed bytes follow parameters, and time is given by the number of steps."""

STEP = 4
"""Widths are tried in multiples of this."""


def twins_of(recipe: Recipe, size: Size) -> list[Arm]:
    """The plain twins of a looped recipe.

    With equal stored ``parameters`` there are two: ``plain`` has as many blocks as are stored, ``deep`` has as many as
    there are visits and is narrower. With equal ``flops`` of training there is ``long``, with as many blocks as there
    are visits.

    Args:
        recipe: with the vocabulary of its tokenizer, which decides what a narrower model saves.
        size: what is equal, within 1 %.

    Raises:
        OuroborosError: the recipe has no loop, or no twin comes within 1 %.
    """
    check(
        recipe.model.schedule.is_looped,
        f"{recipe.name} has no loop, so it has no plain twin; name the recipe to compare it with: --against RECIPE",
    )
    if size == "flops":
        return [arm("long", recipe, twin(recipe, "flops"))]
    return [arm("plain", recipe, twin(recipe)), arm("deep", recipe, deep_twin(recipe))]


def deep_twin(recipe: Recipe) -> Recipe:
    """The plain recipe with as many blocks as ``recipe`` has visits, and as many stored parameters: it is narrower.

    The number of heads stays. Of all widths that the model's parts allow it takes the one with which the feed-forward
    network is as many times as wide as before.

    Raises:
        OuroborosError: no width comes within 1 %.
    """
    plain = twin(recipe, "depth")
    shape = plain.model.block.ffn.hidden_width / plain.model.hidden_size
    found: dict[float, ModelSpec] = {}
    for width in range(STEP, plain.model.hidden_size, STEP):
        try:
            model = equal_size(plain.model.replace(hidden_size=width), recipe.model)
        except OuroborosError:  # parts refuse a width that their heads do not divide
            continue
        if model.block.mixer.heads(width).width % 2:  # positions rotate pairs of channels
            continue
        found[abs(math.log(model.block.ffn.hidden_width / width / shape))] = model
    check(
        bool(found),
        f"no width below {plain.model.hidden_size} gives a plain twin of layout {recipe.model.layout!r} with"
        f" {plain.model.layout} blocks and equal parameters within 1 %",
    )
    words = {"name": f"{recipe.name}-deep", "description": f"deep twin of {recipe.name}: equal parameters, narrower"}
    return dataclasses.replace(plain, model=found[min(found)], **words)


def opponent(recipe: Recipe, other: Recipe, size: Size) -> Arm:
    """Another recipe as the twin: as it is if it is within 1 % already, else with a resized feed-forward network.

    Args:
        recipe: with the vocabulary of its tokenizer.
        other: the recipe to compare with; it gets the text, the length of the run and the batches of ``recipe``.
        size: what is made equal.

    Raises:
        OuroborosError: no width of its feed-forward network comes within 1 %.
    """
    model = other.model.replace(vocab_size=recipe.model.vocab_size)
    model = model.replace(max_position_embeddings=recipe.model.max_position_embeddings)
    context = (recipe.data.sequence_length + 1) // 2
    wanted, loops = measure(recipe.model, size, context, recipe.train.loops), other.train.loops
    if abs(measure(model, size, context, loops) / wanted - 1) > 0.01:
        model = equal_size(model, wanted, size, context, loops=loops, name=f"recipe {other.name}")
    train = dataclasses.replace(other.train, **{name: getattr(recipe.train, name) for name in _SAME})
    made = dataclasses.replace(other, model=model, data=recipe.data, train=train)
    return arm(other.name, recipe, made)


_SAME = ("steps", "tokens", "minutes", "batch_size", "accumulation", "seed", "precision", "threads", "compile")
"""Fields of ``train`` that another recipe gets: how much is trained, on what, and how it is computed."""


def arm(name: str, recipe: Recipe, other: Recipe) -> Arm:
    """``other`` as an arm beside ``recipe``, with all that it changes declared; the same recipe is a repetition."""
    changes = tuple(differences(recipe, other))
    return Arm(name=name, recipe=other, changes=changes, repeat=not changes)
