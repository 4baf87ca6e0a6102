"""Which parts a model has, on the command line, and the refusal of options that change nothing.

tyro makes options of the specifications that are there. What is here chooses them before:

* ``--model.residual delta`` takes another part of the family; its options are then ``--model.residual.values 4``;
* ``--model.loop.gate`` adds a part to a list, ``--model.loop.gate.bias -1`` sets an option of it,
  ``--model.loop.inject concat`` adds a part that has one option with this option set, ``--model.loop.no-gate`` takes
  it out;
* ``--model.at.WHERE.ffn.intermediate-size 1024`` changes the blocks of a named segment, of a number or of a range.

tyro checks the model when all options are known, so their order does not matter.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from ouroboros.config import BlockOverride, BlockSpec, ModelSpec, Part, Recipe, fields_by_path, from_dict, to_dict
from ouroboros.config.codec import type_hints
from ouroboros.config.needs import idle
from ouroboros.config.part import is_family, kinds, of_kind
from ouroboros.errors import OuroborosError, UsageError, nearest
from ouroboros.verbs.options import parse
from ouroboros.verbs.parts_help import explained, unchecked

T = TypeVar("T")

PREFIX = "--model."
OVERRIDE = "at"
LITERALS = {"None": None, "True": True, "False": False}
"""Values as tyro writes them; JSON has its own spelling."""


def parse_with_parts(
    cls: type[T], verb: str, arguments: Sequence[str], default: Any, others: Collection[str] = ()
) -> T:
    """As :func:`~ouroboros.verbs.options.parse`, with the parts that ``arguments`` choose for ``default.model``."""
    rest, model = take_parts(arguments, default.model, others)
    default = dataclasses.replace(default, model=model)
    if {"-h", "--help"} & set(rest):
        cls, default = explained(cls, default)
    return parse(cls, verb, rest, default=default)


class _Value(NamedTuple):
    """What may be the value of an option: the words behind it, or one that was joined to it by ``=``."""

    words: list[str]
    attached: bool
    others: Collection[str]

    @property
    def given(self) -> bool:
        """Whether an option that needs no value has one."""
        return self.attached or (
            bool(self.words) and not self.words[0].startswith("--") and self.words[0] not in self.others
        )

    def text(self) -> str:
        if not self.attached and (not self.words or self.words[0].startswith("--")):
            raise UsageError("expected a value")
        return self.words.pop(0)

    def plain(self) -> Any:
        """A JSON value, or the text as it is."""
        text = self.text()
        try:
            return LITERALS[text] if text in LITERALS else json.loads(text)
        except json.JSONDecodeError:
            return text

    def switch(self) -> Any:
        """True, unless a value follows."""
        return self.plain() if self.attached or self.words[:1] in (["True"], ["False"]) else True


def take_parts(arguments: Sequence[str], model: ModelSpec, others: Collection[str] = ()) -> tuple[list[str], ModelSpec]:
    """The arguments that are left, and the model, not yet checked, with the parts that the others choose.

    Args:
        arguments: of the verb.
        model: the parts that are there.
        others: words that are no values where a value may be left out, such as the names of recipes.

    Raises:
        UsageError: an unknown part, a value that it refuses, or an option of a part that is not chosen.
    """
    rest: list[str] = []
    words = list(arguments)
    at: dict[str, dict[str, Any]] = {}
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith(PREFIX):
            rest.append(word)
            continue
        path = name.removeprefix(PREFIX).split(".")
        left = _Value([value] if equals else words, bool(equals), others)
        try:
            if path[0] == OVERRIDE:
                where, option, setting = _override(path, left)
                at.setdefault(where, {})[option] = setting
                continue
            changed = _change(model, [part.replace("-", "_") for part in path], left)
        except OuroborosError as error:
            raise UsageError(f"{name}: {error}") from None
        if changed is None:
            rest.append(word)
        else:
            model = changed
    _refuse_options_of_others(rest, model)
    # The choice of a part comes before its options.
    added = (BlockOverride(where=w, set=dict(sorted(s.items(), key=lambda i: i[0].count(".")))) for w, s in at.items())
    return rest, unchecked(model, overrides=(*model.overrides, *added))


def _change(model: ModelSpec, path: list[str], value: _Value) -> ModelSpec | None:
    """``model`` after the option at ``path``; None: it is no option that chooses parts."""
    first, *inner = path
    hints, in_block = type_hints(ModelSpec), type_hints(BlockSpec)
    listed = typing.get_args(hints.get(first))
    if listed and is_family(listed[0]):
        return unchecked(model, **{first: _listed(listed[0], getattr(model, first), inner, value)})
    if inner and inner != ["kind"]:
        return None
    if is_family(hints.get(first)):
        return unchecked(model, **{first: of_kind(getattr(model, first), value.text())})
    if is_family(in_block.get(first)):
        part = of_kind(getattr(model.block, first), value.text())
        return unchecked(model, block=dataclasses.replace(model.block, **{first: part}))
    return None


def _listed(family: Any, present: tuple[Part, ...], path: list[str], value: _Value) -> tuple[Part, ...]:
    """A list of parts after one of them was added, changed or taken out."""
    members, held = kinds(family), {part.kind: part for part in present}
    if not path:
        raise UsageError(f"name a part of the list: {', '.join(members)}")
    kind, *option = path
    if kind not in members and kind.removeprefix("no_") in members and not option:
        held.pop(kind.removeprefix("no_"), None)
        return tuple(held.values())
    if kind not in members:
        shown = kind.removeprefix("no_").replace("_", "-")
        raise UsageError(f"unknown part {shown!r}{nearest(shown, [m.replace('_', '-') for m in members])}")
    values = to_dict(held[kind]) if kind in held else {"kind": kind}
    own = [field.name for field in dataclasses.fields(members[kind]) if field.name != "kind"]
    if option:
        values |= dict([_setting(members[kind], option, value)])
    elif own and value.given:
        setting = value.plain()
        if setting in ("none", False, None):
            held.pop(kind, None)
            return tuple(held.values())
        if len(own) > 1:
            raise UsageError(f"say which option has the value {setting!r}: {', '.join(own)}")
        values[own[0]] = setting
    made: Part = from_dict(members[kind], values, where=kind)
    if kind in held:  # it stays in its place
        return tuple((held | {kind: made}).values())
    order = list(members)
    later = [index for index, name in enumerate(held) if order.index(name) > order.index(kind)]
    index = min(later, default=len(present))  # before the first one that the registry has behind it
    return (*present[:index], made, *present[index:])


def _override(path: list[str], value: _Value) -> tuple[str, str, Any]:
    """Where blocks differ, in which option, and its value."""
    if len(path) < 3:
        raise UsageError(f"expected {PREFIX}{OVERRIDE}.WHERE.OPTION, for example {PREFIX}{OVERRIDE}.0-1.ffn.bias")
    option, setting = _setting(BlockSpec, [name.replace("-", "_") for name in path[2:]], value)
    return path[1], option.removesuffix(".kind"), setting


def _setting(owner: Any, path: list[str], value: _Value) -> tuple[str, Any]:
    """The dotted path of an option and its value; a switch needs none, and ``no-`` before its name turns it off."""
    *before, name = path
    if bool in _types(owner, [*before, name.removeprefix("no_")]):
        off = name.startswith("no_") and not _types(owner, path)
        return ".".join([*before, name.removeprefix("no_") if off else name]), False if off else value.switch()
    return ".".join(path), value.plain()


def _types(owner: Any, path: list[str]) -> set[Any]:
    """The types that the option at ``path`` has in whatever part ``owner`` may be."""
    if not path:
        return {owner}
    found = [hints[path[0]] for hints in map(type_hints, _specifications(owner)) if path[0] in hints]
    return {kind for hint in found for kind in _types(hint, path[1:])}


def _specifications(hint: Any) -> Iterator[Any]:
    choices = kinds(hint).values() if is_family(hint) else typing.get_args(hint) or (hint,)
    yield from (choice for choice in choices if dataclasses.is_dataclass(choice))


def _refuse_options_of_others(arguments: Sequence[str], model: ModelSpec) -> None:
    """Refuse an option that the chosen part lacks and another one of its family has.

    Raises:
        UsageError: the option, and the part to choose.
    """
    for word in arguments:
        name = word.partition("=")[0]
        if not name.startswith(PREFIX):
            continue
        first, *path = name.removeprefix(PREFIX).replace("-", "_").split(".")
        owner = next((spec for spec in (model.block, model) if hasattr(spec, first)), None)
        if not path or owner is None or not is_family(type_hints(type(owner))[first]):
            continue
        known = [path, [*path[:-1], path[-1].removeprefix("no_")]]
        having = {
            kind: spec
            for kind, spec in kinds(type_hints(type(owner))[first]).items()
            if any(_types(spec, path) for path in known)
        }
        if having and type(getattr(owner, first)) not in having.values():
            _refuse(name, f"{PREFIX}{first} {' or '.join(having)}")


def refuse_idle(recipe: Recipe, default: Recipe) -> None:
    """Refuse an option that differs from the recipe's and changes nothing, because another one is off.

    Raises:
        UsageError: the option, and what would give it an effect.
    """
    for section in ("model", "data", "optim", "train"):
        spec, usual = getattr(recipe, section), fields_by_path(getattr(default, section))
        values = fields_by_path(spec)
        usual = _defaults(spec) | usual
        for path, why in idle(spec, recipe=recipe):
            below = [name for name in values if name == path or name.startswith(f"{path}.")]
            for name in below or [path]:
                if values.get(name) != usual.get(name):
                    _refuse(_option(section, name), _needed(section, why))
    for override in recipe.model.overrides:
        if override not in default.model.overrides:
            _refuse_idle_override(recipe.model, override)


def _defaults(spec: Any, prefix: str = "") -> dict[str, Any]:
    """The options that a part has when it is chosen, by path, and not that it is chosen."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        for part in value if isinstance(value, tuple) else (value,):
            path = f"{prefix}{field.name}."
            if hasattr(part, "kind"):
                path += f"{part.kind}." if isinstance(value, tuple) else ""
                usual = fields_by_path(type(part)(kind=part.kind))
                found |= {path + name: item for name, item in usual.items() if name != "kind"}
            elif dataclasses.is_dataclass(part):
                found |= _defaults(part, path)
    return found


def _refuse_idle_override(model: ModelSpec, override: BlockOverride) -> None:
    """Refuse it if an option of it changes nothing in any block that it is for."""
    needed = [dict(idle(model.blocks[index])) for index in model.schedule.blocks_at(override.where)]
    section = f"model.{OVERRIDE}.{override.where}"
    for path in override.set:
        if all(path in block for block in needed):
            _refuse(_option(section, path), _needed(section, needed[0][path]))


def _refuse(option: str, needed: str) -> None:
    raise UsageError(f"{option} changes nothing here; it needs {needed}")


def _needed(section: str, why: str) -> str:
    """``block.mixer.decay = true`` as the option that it is; a sentence stays one."""
    option, equals, value = why.partition(" = ")
    return f"{_option(section, option)} {value}".removesuffix(" true") if equals else why


def _option(section: str, path: str) -> str:
    return f"--{section}.{path.removeprefix('block.').removesuffix('.kind')}".replace("_", "-")
