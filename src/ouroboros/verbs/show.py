"""``ouroboros recipes`` and ``ouroboros show RECIPE``."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from ouroboros.accounting import cost, describe
from ouroboros.config import ModelSpec, Recipe, to_dict
from ouroboros.recipes import RECIPES, recipe, sizes
from ouroboros.verbs.options import Json, emit_json, parse, say
from ouroboros.verbs.parts import parse_with_parts, refuse_idle


@dataclasses.dataclass(frozen=True)
class RecipesOptions:
    """List the recipes with their sizes and parameter counts."""

    json: Json = False


def recipes(arguments: Sequence[str]) -> int:
    """The verb ``recipes``."""
    options = parse(RecipesOptions, "recipes", arguments)
    rows: dict[str, dict[str, Any]] = {}
    for name, value in RECIPES.items():
        models = {size: recipe(name, size).model for size in sizes(name)}
        facts = {size: {"layout": m.layout, "parameters": cost(m).parameters} for size, m in models.items()}
        rows[name] = {"description": value.description, "sizes": facts}
    if options.json:
        emit_json(rows)
        return 0
    width = max(map(len, rows))
    for name, row in rows.items():
        say(f"{name:<{width}} {row['description']}")
        for size, facts in row["sizes"].items():
            say(f"{'':<{width}} {size:<6} {facts['layout']:<12} {facts['parameters']:>12,} parameters")
    return 0


@dataclasses.dataclass(frozen=True)
class ShowOptions:
    """Draw a recipe's schedule; print its parameters, FLOPs per token and cache bytes per token."""

    recipe: tyro.conf.Positional[str]
    """The name of the recipe, see `ouroboros recipes`, or a model: a directory or a packed file."""
    size: str = "small"
    """The size of the model: tiny, small, base or another one that `ouroboros recipes` lists."""
    context: int = 512
    """How many positions a token attends to, which decides the FLOPs."""
    loops: int | None = None
    """Count loops by this number in place of the layout's."""
    json: Json = False
    model: ModelSpec = dataclasses.field(default_factory=ModelSpec)


def show(arguments: Sequence[str]) -> int:
    """The verb ``show``."""
    name, size = named(arguments)
    chosen = _chosen(name, size or "small")
    options = _parse(arguments, chosen)
    if options.recipe != chosen.name:  # the recipe came after an option
        chosen = _chosen(options.recipe, options.size)
        options = _parse(arguments, chosen)
    refuse_idle(dataclasses.replace(chosen, model=options.model), chosen, arguments)
    model = options.model
    if options.loops is not None:
        model = dataclasses.replace(model, layout=model.schedule.with_loops(options.loops).notation)
    trained = _trained(model, chosen.optim.left_out)
    if options.json:
        facts = cost(model, context=options.context)
        emit_json(
            dataclasses.asdict(facts)
            | ({} if trained is None else {"trained_parameters": trained})
            | {"cache_bytes_per_token": facts.cache_bytes_per_token(), "state_bytes": facts.state_bytes()}
            | {"bytes_at_6_bits": facts.parameters * 6 // 8, "model": to_dict(model)}
        )
    else:
        say(describe(model, context=options.context, trained=trained))
    return 0


def _chosen(name: str, size: str) -> Recipe:
    """The recipe of this name, or what stands for the model at this path."""
    if name in RECIPES or not Path(name).exists():
        return recipe(name, size)
    from ouroboros.api import open_model

    return Recipe(name=name, model=open_model(name).spec)


def _trained(model: ModelSpec, left_out: tuple[str, ...]) -> int | None:
    """Numbers that training changes, counted on a model without weights; None if that is all of them."""
    if not left_out and not any(part.freezes for part in model.parts):
        return None
    import torch

    from ouroboros.model.configuration import OuroborosConfig
    from ouroboros.model.modeling import OuroborosForCausalLM
    from ouroboros.optim import matching, untrained_parameters

    with torch.device("meta"):
        built = OuroborosForCausalLM(OuroborosConfig.from_spec(model))
    numbers = {name: parameter.numel() for name, parameter in built.named_parameters()}
    out = untrained_parameters(built) | set(matching(list(numbers), left_out, "optim.left_out"))
    return sum(count for name, count in numbers.items() if name not in out)


def _parse(arguments: Sequence[str], chosen: Recipe) -> ShowOptions:
    start_from = ShowOptions(recipe=tyro.MISSING, model=chosen.model)
    return parse_with_parts(ShowOptions, "show", arguments, start_from, others=RECIPES)


def named(arguments: Sequence[str]) -> tuple[str, str | None]:
    """The recipe and the ``--size``, if any, that ``arguments`` name, before the other options can be parsed.

    If the first word is an option, the recipe is the first word that is one's name, or ``loop``.
    """
    sizes = [after for word, after in itertools.pairwise(arguments) if word == "--size"]
    sizes += [word.partition("=")[2] for word in arguments if word.startswith("--size=")]
    first = arguments[0] if arguments and not arguments[0].startswith("-") else None
    name = first or next((word for word in arguments if word in RECIPES), "loop")
    return name, sizes[-1] if sizes else None
