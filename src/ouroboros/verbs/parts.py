"""Which parts a model has, on the command line, and the refusal of options that change nothing.

tyro makes options of the specifications that are there. What is here chooses them before:

* ``--model.residual delta`` takes another part of the family; its options are then ``--model.residual.values 4``;
* ``--model.loop.gate`` adds a part to a list, ``--model.loop.gate.bias -1`` sets an option of it,
  ``--model.loop.inject concat`` adds it with its first option set, ``--model.loop.no-gate`` takes it out;
* ``--model.at.WHERE.ffn.intermediate-size 1024`` changes the blocks of a named segment, of a number or of a range.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from ouroboros.config import BlockOverride, BlockSpec, ModelSpec, Part, Recipe, fields_by_path, from_dict, to_dict
from ouroboros.config.codec import type_hints
from ouroboros.config.needs import idle
from ouroboros.config.part import is_family, kinds
from ouroboros.errors import OuroborosError, UsageError, nearest

PREFIX = "--model."
OVERRIDE = "at"


def take_parts(arguments: Sequence[str], model: ModelSpec) -> tuple[list[str], ModelSpec]:
    """The arguments that are left, and the model with the parts that the others choose.

    Raises:
        UsageError: an unknown part or a value that it refuses.
    """
    rest: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith(PREFIX):
            rest.append(word)
            continue
        path = name.removeprefix(PREFIX).replace("-", "_").split(".")
        if equals:
            words.insert(0, value)
        try:
            changed = _change(model, path, words, bool(equals))
        except OuroborosError as error:
            raise UsageError(f"{name}: {error}") from None
        if changed is None:
            rest += [word]
            if equals:
                words.pop(0)
        else:
            model = changed
    return rest, model


def _change(model: ModelSpec, path: list[str], words: list[str], attached: bool) -> ModelSpec | None:
    """``model`` after the option at ``path``, whose value is taken from ``words``; None: it is no option of parts."""
    first, *inner = path
    if first == OVERRIDE and len(inner) > 1:
        override = BlockOverride(where=inner[0].replace("_", "-"), set={".".join(inner[1:]): _plain(_take(words))})
        return model.replace(overrides=(*model.overrides, override))
    hints = type_hints(ModelSpec)
    listed = typing.get_args(hints.get(first))
    if listed and is_family(listed[0]) and inner:
        return model.replace(**{first: _listed(listed[0], getattr(model, first), inner, words, attached)})
    if inner and inner != ["kind"]:
        return None
    if is_family(hints.get(first)):
        return model.replace(**{first: _chosen(hints[first], getattr(model, first), words)})
    in_block = type_hints(BlockSpec)
    if is_family(in_block.get(first)):
        return model.replace(**{first: _chosen(in_block[first], getattr(model.block, first), words)})
    return None


def _chosen(family: Any, present: Part, words: list[str]) -> Part:
    """Another part of the family; the present one with its options if it is of that kind already."""
    kind, members = _take(words), kinds(family)
    if kind not in members:
        raise UsageError(f"unknown kind {kind!r}{nearest(kind, members)}; there are {', '.join(members)}")
    return dataclasses.replace(present, kind=kind) if members[kind] is type(present) else members[kind](kind=kind)


def _listed(
    family: Any, present: tuple[Part, ...], path: list[str], words: list[str], attached: bool
) -> tuple[Part, ...]:
    """A list of parts after one of them was added, changed or taken out; parts act in the order of the registry."""
    members = kinds(family)
    kind, *option = path
    if kind not in members and kind.removeprefix("no_") in members:
        return tuple(part for part in present if part.kind != kind.removeprefix("no_"))
    if kind not in members:
        raise UsageError(f"unknown part {kind!r}{nearest(kind, members)}; there are {', '.join(members)}")
    values = next((to_dict(part) for part in present if part.kind == kind), {"kind": kind})
    own = [field.name for field in dataclasses.fields(members[kind]) if field.name != "kind"]
    if option or (own and (attached or (words and not words[0].startswith("--")))):
        value = _plain(_take(words))
        if not option and value in ("none", False):
            return tuple(part for part in present if part.kind != kind)
        values[".".join(option) if option else own[-1]] = value
    made: Part = from_dict(members[kind], values, where=kind)
    order = list(members)
    return tuple(sorted((*(p for p in present if p.kind != kind), made), key=lambda part: order.index(part.kind)))


def _take(words: list[str]) -> str:
    if not words or words[0].startswith("--"):
        raise UsageError("expected a value")
    return words.pop(0)


def _plain(text: str) -> Any:
    """A JSON value, or the text as it is."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def refuse_idle(recipe: Recipe, default: Recipe) -> None:
    """Refuse an option that differs from the recipe's and changes nothing, because another one is off.

    Raises:
        UsageError: the option, and what would give it an effect.
    """
    for section in ("model", "data", "optim", "train"):
        spec, base = getattr(recipe, section), getattr(default, section)
        values, usual = fields_by_path(spec), _usual(spec, base)
        for path, why in idle(spec, recipe=recipe):
            below = [name for name in values if name == path or name.startswith(f"{path}.")]
            for name in below or [path]:
                if values.get(name) != usual.get(name):
                    raise UsageError(
                        f"--{_option(section, name)} changes nothing here; it needs {_needed(section, why)}"
                    )


def _usual(spec: Any, default: Any) -> dict[str, Any]:
    """The values by path of options that nobody has given: those of ``default``, and of a part of another kind its own.

    A part's kind is not among the latter: to choose the part is to give an option.
    """
    found = fields_by_path(default)
    for path, part in _parts(spec):
        if found.get(f"{path}.kind") != part.kind:
            start = fields_by_path(type(part)(kind=part.kind))
            found |= {f"{path}.{name}": value for name, value in start.items() if name != "kind"}
    return found


def _parts(spec: Any, prefix: str = "") -> Iterator[tuple[str, Part]]:
    """Every part of ``spec`` by its path; one of a list is named by its kind, as in :func:`fields_by_path`."""
    for field in dataclasses.fields(spec):
        value, path = getattr(spec, field.name), f"{prefix}{field.name}"
        found = {f"{path}.{item.kind}": item for item in value} if _is_list_of_parts(value) else {path: value}
        for place, item in found.items():
            if isinstance(item, Part):
                yield place, item
            elif dataclasses.is_dataclass(item):
                yield from _parts(item, f"{place}.")


def _is_list_of_parts(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(isinstance(item, Part) for item in value)


def _needed(section: str, why: str) -> str:
    """What an option needs, by its whole path where it is another option."""
    return f"{section}.{why.removeprefix('block.')}" if " = " in why else why


def _option(section: str, path: str) -> str:
    return f"{section}.{path.removeprefix('block.').removesuffix('.kind')}".replace("_", "-")
