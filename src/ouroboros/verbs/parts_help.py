"""``--help`` of what chooses parts: options that tyro does not see, because they are taken before it.

For ``--help`` alone, the model's options gain fields that stand for them, each with the sentences of the part.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Annotated, Any, Literal

from tyro.conf import arg

from ouroboros.config import BlockSpec, ModelSpec, Part
from ouroboros.config.codec import type_hints
from ouroboros.config.part import is_family, kinds

AT = (
    "Changes an option of some blocks: WHERE is the name of a segment in the layout, a block's number or a range of"
    " numbers, for example --model.at.0-1.ffn.intermediate-size 64."
)
LIST = " A part with one option takes its value directly, as in --model.loop.inject concat."


def explained(cls: type, default: Any) -> tuple[type, Any]:
    """Options with a field ``model``, and their defaults, with the fields that explain the choice of parts."""
    more = list(_explanations(default.model))
    model_class = dataclasses.make_dataclass("ModelSpec", more, bases=(ModelSpec,), frozen=True, kw_only=True)
    model_class.__doc__ = ModelSpec.__doc__
    model = model_class(**{field.name: getattr(default.model, field.name) for field in dataclasses.fields(ModelSpec)})
    fields: Any = [("model", model_class, dataclasses.field(default=model))]
    options = dataclasses.make_dataclass(cls.__name__, fields, bases=(cls,), frozen=True, kw_only=True)
    options.__doc__ = cls.__doc__
    return options, options(**{**vars(default), "model": model})


def _explanations(model: ModelSpec) -> Any:
    """Fields of ``make_dataclass``: the choice of every family, the parts of every list, and overrides."""
    for owner in (model, model.block):
        base = ModelSpec if owner is model else BlockSpec
        for name, hint in type_hints(base).items():
            if is_family(hint):
                choice: Any = Literal[tuple(kinds(hint))]  # pyrefly: ignore
                yield _field(f"{name}_choice", choice, name, getattr(owner, name).kind, _choice(hint))
    for name, hint in type_hints(ModelSpec).items():
        listed = typing.get_args(hint)
        if listed and is_family(listed[0]):
            parts = _list_class(name, listed[0], getattr(model, name))
            yield _field(f"{name}_parts", parts, name, parts(), None)
    yield _field("at", str, "at.WHERE.OPTION", "", AT)


def _list_class(name: str, family: Any, present: tuple[Part, ...]) -> Any:
    """A dataclass of a switch and the options for each part that the list ``name`` may hold."""
    there = {part.kind: part for part in present}
    fields = []
    for kind, spec in kinds(family).items():
        part = there.get(kind) or spec(kind=kind)
        fields.append(_field(kind, bool, kind, kind in there, _sentences(spec)))
        if len(dataclasses.fields(part)) > 1:
            fields.append(_field(f"{kind}_options", spec, kind, part, None))
    made = dataclasses.make_dataclass(name, fields, frozen=True, kw_only=True)
    made.__doc__ = _sentences(family) + (LIST if any(name.endswith("_options") for name, *_ in fields) else "")
    return made


def _choice(family: Any) -> str:
    """What each part of a family is."""
    members = kinds(family)
    names = {spec: [kind for kind, one in members.items() if one is spec] for spec in members.values()}
    each = " ".join(f"{', '.join(kinds)}: {_sentences(spec)}" for spec, kinds in names.items())
    more = " Behind it, --help shows the options of the part." if len(names) > 1 else ""
    return f"{_sentences(family)} {each}{more}"


def _field(name: str, kind: Any, option: str, default: Any, text: str | None) -> tuple[str, Any, Any]:
    shown: Any = Annotated[kind, arg(name=option, help=text, metavar="VALUE" if default == "" else None)]
    return name, shown, dataclasses.field(default=default)


def _sentences(cls: type) -> str:
    """The first paragraph of a class's docstring on one line."""
    return " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split())
