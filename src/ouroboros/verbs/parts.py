"""The model on the command line: its parts and their options, and the refusal of options that change nothing.

Which options there are depends on the parts, so ``--model.*`` is read here, in any order, and not by tyro:

* ``--model.residual delta`` takes another part of the family; its options are then ``--model.residual.values 4``;
* ``--model.loop.gate`` adds a part to a list, ``--model.loop.gate.bias -1`` sets an option of it,
  ``--model.loop.inject concat`` adds a part that has one option with this option set, ``--model.loop.no-gate`` takes
  it out;
* ``--model.at.WHERE.ffn.intermediate-size 1024`` changes the blocks of a named segment, of a number or of a range.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from ouroboros.config import BlockSpec, ModelSpec, Recipe, fields_by_path, from_dict, to_dict
from ouroboros.config.codec import type_hints
from ouroboros.config.needs import idle
from ouroboros.config.part import is_family, kinds, of_kind
from ouroboros.errors import OuroborosError, UsageError, check, nearest
from ouroboros.verbs.options import parse
from ouroboros.verbs.parts_help import explained

T = TypeVar("T")

PREFIX = "--model."
OVERRIDE = "at"
LITERALS = {"None": None, "True": True, "False": False}
"""Values as tyro writes them; JSON has its own spelling."""


def parse_with_parts(
    cls: type[T], verb: str, arguments: Sequence[str], default: Any, others: Collection[str] = ()
) -> T:
    """As :func:`~ouroboros.verbs.options.parse`, with the model that ``arguments`` make of ``default.model``."""
    rest, model = take_model(arguments, default.model, others)
    default = dataclasses.replace(default, model=model)
    if {"-h", "--help"} & set(rest):
        cls, default = explained(cls, default)
    return parse(cls, verb, rest, default=default)


def take_model(arguments: Sequence[str], model: ModelSpec, others: Collection[str] = ()) -> tuple[list[str], ModelSpec]:
    """The arguments that are left, and ``model`` as the others change it.

    Args:
        arguments: of the verb.
        model: what it is without them.
        others: words that are no values where a value may be left out, such as the names of recipes.

    Raises:
        UsageError: an unknown option or part, a value that it refuses, or an option of a part that is not chosen.
    """
    rest: list[str] = []
    words, values = list(arguments), to_dict(model)
    settings: list[tuple[str, list[str], Any]] = []
    at: dict[str, dict[str, Any]] = {}
    while words:
        word = words.pop(0)
        option, equals, value = word.partition("=")
        if not option.startswith(PREFIX):
            rest.append(word)
            continue
        first, *path = option.removeprefix(PREFIX).split(".")
        first, names = first.replace("-", "_"), [name.replace("-", "_") for name in path]
        reader = _Reader([value] if equals else words, bool(equals), others)
        listed = typing.get_args(type_hints(ModelSpec).get(first))
        try:
            if first == OVERRIDE:
                check(len(path) >= 2, f"expected {PREFIX}at.WHERE.OPTION, for example {PREFIX}at.0-1.ffn.bias")
                inner, setting = reader.setting(BlockSpec, names[1:])
                at.setdefault(path[0], {})[".".join(inner).removesuffix(".kind")] = setting
            elif listed and is_family(listed[0]):
                values[first] = _listed(listed[0], values[first], names, reader)
            else:
                owner = BlockSpec if first in values["block"] else ModelSpec
                settings.append((option, *reader.setting(owner, [first, *names])))
        except OuroborosError as error:
            raise UsageError(f"{option}: {error}") from None
    if len(rest) == len(arguments):
        return rest, model
    for option, path, setting in sorted(settings, key=lambda each: len(each[1])):  # a part before its options
        _assign(values, option, path, setting)
    for where, changes in at.items():
        ordered = dict(sorted(changes.items(), key=lambda item: item[0].count(".")))
        values["overrides"].append({"where": where, "set": ordered})
    try:
        return rest, from_dict(ModelSpec, values, where="--model")
    except OuroborosError as error:
        raise UsageError(str(error)) from None


@dataclasses.dataclass
class _Reader:
    """Reads the value of an option from the words behind it, or from one that was joined to it by ``=``."""

    words: list[str]
    attached: bool
    others: Collection[str]

    def follow(self) -> int:
        """How many words may be values."""
        others = (n for n, word in enumerate(self.words) if word.startswith("--") or word in self.others)
        return 1 if self.attached else next(others, len(self.words))

    def setting(self, owner: Any, path: list[str]) -> tuple[list[str], Any]:
        """The path of an option and its value; a switch needs none, and ``no-`` before its name turns it off."""
        *before, name = path
        positive = [*before, name.removeprefix("no_")]
        if bool in _types(owner, positive) and not _types(owner, path):
            return positive, False
        return path, self.value(_types(owner, path))

    def value(self, types: set[Any]) -> Any:
        """A value of one of these types: the text itself for one of text, and otherwise as JSON has it."""
        if not types and not self.follow():  # it is unknown, which is said later
            return None
        if bool in types and not self.attached and self.words[:1] not in (["True"], ["False"]):
            return True
        check(self.attached or (bool(self.words) and not self.words[0].startswith("--")), "expected a value")
        if tuple in map(typing.get_origin, types) and self.words[0] != "None":
            return [_plain(self.words.pop(0)) for _ in range(self.follow())]
        text = self.words.pop(0)
        return text if str in types else _plain(text)


def _plain(text: str) -> Any:
    try:
        return LITERALS[text] if text in LITERALS else json.loads(text)
    except json.JSONDecodeError:
        return text


def _assign(values: dict[str, Any], option: str, path: list[str], setting: Any) -> None:
    """Set an option of the model given as JSON values; where it is a part, another one of its family."""
    owner, home = (BlockSpec, values["block"]) if path[0] in values["block"] else (ModelSpec, values)
    family: Any = type_hints(owner).get(path[0])
    if is_family(family) and path[1:] in ([], ["kind"]):
        present = home[path[0]]
        try:
            home[path[0]] = to_dict(of_kind(from_dict(kinds(family)[present["kind"]], present), setting))
        except OuroborosError as error:
            raise UsageError(f"{option}: {error}") from None
        return
    inner, known = home, PREFIX
    for name in path[:-1]:
        inner, known = inner.get(name) if isinstance(inner, dict) else None, f"{known}{name}."
    if isinstance(inner, dict) and path[-1] in inner:
        inner[path[-1]] = setting
        return
    having = [kind for kind, spec in kinds(family).items() if _types(spec, path[1:])] if is_family(family) else []
    if having:
        _refuse(option, f"{PREFIX}{path[0]} {' or '.join(having)}")
    names = [*(inner if isinstance(inner, dict) else ()), *(values["block"] if len(path) == 1 else ())]
    hint = nearest(option, [f"{known}{name}".replace("_", "-") for name in names])
    raise UsageError(f"unknown option {option}{hint}")


def _listed(family: Any, present: list[dict[str, Any]], path: list[str], reader: _Reader) -> list[dict[str, Any]]:
    """A list of parts after one of them was added, changed or taken out."""
    members, held = kinds(family), {part["kind"]: part for part in present}
    check(bool(path), f"name a part of the list: {', '.join(members)}")
    kind, *option = path
    taken = kind.removeprefix("no_")
    if kind not in members:
        shown = [member.replace("_", "-") for member in members]
        check(taken in members and not option, f"unknown part {taken.replace('_', '-')!r}{nearest(taken, shown)}")
        return [part for part in present if part["kind"] != taken]
    values = dict(held.get(kind, {"kind": kind}))
    own = [field.name for field in dataclasses.fields(members[kind]) if field.name != "kind"]
    if option:
        path, setting = reader.setting(members[kind], option)
        values[".".join(path)] = setting
    elif own and reader.follow():
        setting = _plain(reader.words.pop(0))
        if setting in ("none", False, None):
            return [part for part in present if part["kind"] != kind]
        check(len(own) == 1, f"say which option has the value {setting!r}: {', '.join(own)}")
        values[own[0]] = setting
    made = to_dict(from_dict(members[kind], values, where=kind))
    if kind in held:  # it stays in its place
        return [*(held | {kind: made}).values()]
    order = list(members)
    later = [index for index, name in enumerate(held) if order.index(name) > order.index(kind)]
    index = min(later, default=len(present))  # before the first one that the registry has behind it
    return [*present[:index], made, *present[index:]]


def _types(owner: Any, path: list[str]) -> set[Any]:
    """The types that the option at ``path`` has in whatever part ``owner`` may be."""
    if not path:
        return {owner, *typing.get_args(owner)}
    specs = kinds(owner).values() if is_family(owner) else typing.get_args(owner) or (owner,)
    hints = [type_hints(spec) for spec in specs if dataclasses.is_dataclass(spec)]
    return {kind for hint in hints if path[0] in hint for kind in _types(hint[path[0]], path[1:])}


def refuse_idle(recipe: Recipe, default: Recipe, arguments: Sequence[str]) -> None:
    """Refuse an option that changes nothing, because another one is off.

    That is an option of the model in ``arguments``, and one of data, optimiser or training that differs from the
    ``default``.

    Raises:
        UsageError: the option, and what would give it an effect.
    """
    options = [word.partition("=")[0] for word in arguments if word.startswith(PREFIX)]
    for path, why in idle(recipe.model):
        for option in options:
            name = option.removeprefix(PREFIX).replace("-", "_").replace(".no_", ".")
            if _within(name, path.removeprefix("block.")):
                _refuse(option.removesuffix(".kind"), _needed("model", why))
    for override in recipe.model.overrides:
        section, blocks = f"model.{OVERRIDE}.{override.where}", recipe.model.schedule.blocks_at(override.where)
        needed = [dict(idle(recipe.model.blocks[index])) for index in blocks]
        for path in override.set if override not in default.model.overrides else ():
            if all(path in block for block in needed):
                _refuse(_option(section, path), _needed(section, needed[0][path]))
    for section in ("data", "optim", "train"):
        spec, usual = getattr(recipe, section), fields_by_path(getattr(default, section))
        values = fields_by_path(spec)
        for path, why in idle(spec, recipe=recipe):
            for name in [name for name in values if _within(name, path)] or [path]:
                if values.get(name) != usual.get(name):
                    _refuse(_option(section, name), _needed(section, why))


def _within(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


def _refuse(option: str, needed: str) -> None:
    raise UsageError(f"{option} changes nothing here; it needs {needed}")


def _needed(section: str, why: str) -> str:
    """``block.mixer.decay = true`` as the option that it is; a sentence stays one."""
    option, equals, value = why.partition(" = ")
    return f"{_option(section, option)} {value}".removesuffix(" true") if equals else why


def _option(section: str, path: str) -> str:
    return f"--{section}.{path.removeprefix('block.').removesuffix('.kind')}".replace("_", "-")
