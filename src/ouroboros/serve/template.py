"""Prompt templates: a line as the beginning of a text of the form that a model was trained on."""

from __future__ import annotations

from ouroboros.config import Recipe
from ouroboros.data.formats import TextFormat, find_format, formats
from ouroboros.data.sources import parse_sources
from ouroboros.errors import OuroborosError

NONE = "none"
"""Stands for no template."""


def find_template(text: str) -> TextFormat | None:
    """A format that makes prompts, by name or as a template; None for ``none``.

    Raises:
        OuroborosError: no such format, or one whose texts have nothing to answer.
    """
    if text == NONE:
        return None
    found = find_format(text)
    if found.prompt("") is None:
        usable = [name for name, form in formats().items() if form.prompt("") is not None]
        raise OuroborosError(
            f"template {text!r} has no second column to answer with; use {', '.join(usable)}, none or a template"
            " such as 'Q: {question}\\nA: {answer}'"
        )
    return found


def recipe_template(recipe: Recipe) -> TextFormat | None:
    """The format of the heaviest source of ``recipe``, if it makes prompts.

    Raises:
        OuroborosError: a source that cannot be read as one.
    """
    heaviest = max(parse_sources(recipe.data.sources, need_files=False), key=lambda ref: ref.weight)
    found = find_format(heaviest.format) if heaviest.format else None
    return found if found and found.prompt("") is not None else None
