"""Whether every switch does something: each option of a specification is given another value, and what that changes is
looked for.

An option may change the *function* (logits at the same weights), the *cost* (parameters, operations, cache), the
*start* (how weights are drawn) or *training* (what is random in it, what is trained). One that changes nothing is dead,
unless the specification says which other option it needs (:mod:`ouroboros.config.needs`).
"""

from __future__ import annotations

import dataclasses
import typing
import zlib
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ouroboros.accounting import Cost, cost
from ouroboros.config import ModelSpec
from ouroboros.config.codec import type_hints
from ouroboros.config.needs import declared_untried, idle
from ouroboros.errors import OuroborosError
from ouroboros.eval.stats import Record
from ouroboros.eval.subject import changed_beyond, logits_of
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM
from ouroboros.optim import untrained_parameters

WIDTHS = (32, 64, 96, 128, 192, 256, 384, 512)
"""Widths at which switches are tried, the first that the parts allow: an option acts whatever the width is."""
VOCABULARY = 257
TOKENS = 13
UNKNOWN = object()
"""Stands for another value of an option for which none can be guessed."""


@dataclass(frozen=True, kw_only=True)
class Switch(Record):
    """What was found about one option."""

    name: str
    """Its dotted path in the recipe."""
    acts: str | None = None
    """What another value changes; None if nothing was seen to change."""
    why: str = ""
    """Why nothing was seen."""
    dead: bool = False
    """Whether it changes nothing and should: nothing declares why, or it is set although what it needs is off."""


def switches(
    spec: Any,
    effect: Callable[[Any], str | None],
    *,
    idle: Mapping[str, str],
    others: Mapping[str, tuple[Any, ...]] | None = None,
    prefix: str = "",
    among: Container[str] | None = None,
    trusting: bool = False,
) -> Iterator[Switch]:
    """Every option of ``spec`` with what it changes.

    Args:
        spec: a specification.
        effect: says what a changed one changes, None for nothing; an OuroborosError says that it is refused.
        idle: what options need that change nothing as the others stand, by path (:func:`~ouroboros.config.needs.idle`).
            They are not tried, and dead if they are set all the same.
        others: see :func:`options`.
        prefix: of the names.
        among: the names of the options that are asked for; None for all.
        trusting: do not try what is declared :func:`~ouroboros.config.needs.untried`. Else it is tried, and its
            declaration counts where nothing is seen.
    """
    declared, found = dict(declared_untried(spec)), dict[str, Switch]()
    for name, changed in options(spec, others):
        if among is not None and prefix + name not in among:
            continue
        need = next((need for path, need in idle.items() if f"{name}.".startswith(f"{path}.")), None)
        if need is not None:
            set_ = _is_set(spec, name)
            found[name] = Switch(name=prefix + name, why=f"needs {need}" + ", but is set" * set_, dead=set_)
        elif name in declared and trusting:
            found[name] = Switch(name=prefix + name, why=f"declared: it {declared[name]}")
        elif name not in found or not found[name].acts:
            tried = _tried(prefix + name, changed, effect)
            if tried.dead and name in declared:
                tried = Switch(name=prefix + name, why=f"declared: it {declared[name]}")
            # That one value does nothing counts more than that another is refused.
            found[name] = tried if name not in found or tried.acts or tried.dead else found[name]
    yield from found.values()


def _tried(name: str, changed: Any | OuroborosError, effect: Callable[[Any], str | None]) -> Switch:
    try:
        if isinstance(changed, OuroborosError):
            raise changed
        acts = effect(changed)
    except OuroborosError as error:
        return Switch(name=name, why=f"not tried: {error}")
    return Switch(name=name, acts=acts, why="" if acts else "another value changes nothing", dead=not acts)


def _is_set(spec: Any, name: str) -> bool:
    """Whether an option has a value that is neither the default nor off."""
    *parents, last = name.split(".")
    for parent in parents:
        spec = {part.kind: part for part in spec}[parent] if isinstance(spec, tuple) else getattr(spec, parent)
    field = next(field for field in dataclasses.fields(spec) if field.name == last)
    return bool(getattr(spec, last)) and getattr(spec, last) != field.default


def options(
    spec: Any, others: Mapping[str, tuple[Any, ...]] | None = None
) -> Iterator[tuple[str, Any | OuroborosError]]:
    """Every option, once or more often: its dotted name, and a specification in which it alone has another value.

    A part in a list is named by its kind. In place of a specification stands the error of one that is refused.

    Args:
        spec: a specification.
        others: values, by the option's last name, that are tried in place of guessed ones.
    """
    for name, path, value in _values(spec, others or {}):
        if value is UNKNOWN:
            yield name, OuroborosError("no other value of it is known")
            continue
        try:
            yield name, _replaced(spec, path, value)
        except OuroborosError as error:
            yield name, error


def _values(spec: Any, others: Mapping[str, tuple[Any, ...]]) -> Iterator[tuple[str, tuple[str | int, ...], Any]]:
    """Every option's name, its path of field names and places in lists, and another value."""
    for field in dataclasses.fields(spec):
        value, hint = getattr(spec, field.name), type_hints(type(spec))[field.name]
        inner: list[tuple[str, tuple[str | int, ...], Any]] = []
        if dataclasses.is_dataclass(value):
            inner = [(field.name, (field.name,), value)]
        elif isinstance(value, tuple) and dataclasses.is_dataclass(typing.get_args(hint)[0]):
            for index, item in enumerate(value):
                if hasattr(item, "kind"):
                    inner.append((f"{field.name}.{item.kind}", (field.name, index), item))
                else:
                    yield f"{field.name}.{index}", (field.name,), (*value[:index], *value[index + 1 :])
        elif field.name != "kind" or len(typing.get_args(hint)) > 1:
            for other in others.get(field.name) or list(another(hint, value)) or [UNKNOWN]:
                if other != value:
                    yield field.name, (field.name,), other
        for name, path, part in inner:
            for below, rest, other in _values(part, others):
                yield f"{name}.{below}", (*path, *rest), other


def _replaced(spec: Any, path: tuple[str | int, ...], value: Any) -> Any:
    if not path:
        return value
    first, rest = path[0], path[1:]
    if isinstance(first, int):
        return (*spec[:first], _replaced(spec[first], rest, value), *spec[first + 1 :])
    return dataclasses.replace(spec, **{first: _replaced(getattr(spec, first), rest, value)})


def another(hint: Any, value: Any) -> Iterator[Any]:
    """Other values that a field of type ``hint`` might take."""
    choices = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        yield from (choice for choice in choices if choice != value)
    elif hint is bool:
        yield not value
    elif isinstance(value, tuple):
        if value and isinstance(value[0], (int, float)):
            yield tuple(2 * item for item in value)
    elif value is None:
        for choice in choices:
            if choice in (int, float):
                yield from (choice(2), choice(6), choice(1), choice(0))
            elif dataclasses.is_dataclass(choice):
                yield choice()
            else:
                yield from typing.get_args(choice) if typing.get_origin(choice) is Literal else ()
    elif isinstance(value, int):
        yield from (value + 1, 2 * value)
    elif isinstance(value, float):
        yield from (value / 2 + 0.01, value + 0.25)


class Behaviour(NamedTuple):
    """What a model computes and costs, for comparison with that of a changed specification."""

    cost: Cost
    untrained: frozenset[str]
    start: dict[str, Tensor]
    """Parameters as they are drawn."""
    random: bool
    """Whether two passes in training differ."""
    logits: Tensor
    """In evaluation, with noise on all parameters."""
    trained: Tensor
    """In training, with the random numbers of one seed."""
    added: Tensor
    """What parts add to the loss in that pass, a number."""
    differs: Callable[[Tensor], bool]
    """Whether logits are others than these, rounding aside."""
    differs_in_training: Callable[[Tensor], bool]


def behaviour(spec: ModelSpec, like: Behaviour | None = None, tokens: int = TOKENS) -> Behaviour:
    """Build a model and run it.

    Args:
        spec: the model.
        like: start from these values wherever name and shape agree, so that functions are compared at equal weights.
        tokens: of each of two sequences.
    """
    torch.manual_seed(0)
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(spec))
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            given = start[name] if like is None else like.start.get(name, start[name])
            # The noise of a parameter depends on its name alone, whatever other parameters there are.
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            parameter.copy_((given if given.shape == parameter.shape else start[name]) + 0.1 * noise)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, spec.vocab_size, (2, min(tokens, spec.max_position_embeddings)), generator=generator)
    torch.manual_seed(2)
    trained, again = (logits_of(model.train(), ids) for _ in range(2))
    torch.manual_seed(2)
    with torch.no_grad():
        output = model(ids, use_cache=False)
    repeated, added = output.logits, torch.zeros(()) if output.auxiliary_loss is None else output.auxiliary_loss
    logits, alone = logits_of(model.eval(), ids), torch.cat([logits_of(model, row) for row in ids.split(1)])
    differs, in_training = changed_beyond(logits, alone), changed_beyond(trained, repeated)
    untrained = frozenset(untrained_parameters(model))
    return Behaviour(cost(spec), untrained, start, in_training(again), logits, trained, added, differs, in_training)


def effect(before: Behaviour, after: Behaviour) -> str | None:
    """What of a model is another one, and None if nothing is."""
    if before.logits.shape != after.logits.shape or before.differs(after.logits):
        return "function"
    if before.cost != after.cost:
        return "cost"
    if before.random != after.random or before.untrained != after.untrained:
        return "training"
    if before.differs_in_training(after.trained) or not torch.isclose(before.added, after.added):
        return "training"
    shapes = [{name: value.shape for name, value in side.start.items()} for side in (before, after)]
    same = shapes[0] == shapes[1] and all(torch.equal(after.start[name], value) for name, value in before.start.items())
    return None if same else "start"


def narrow(spec: ModelSpec, least: int = 0) -> ModelSpec:
    """The model at the smallest of :data:`WIDTHS` from ``least`` on, and the smallest vocabulary, that its parts allow,
    so that building it often takes little time."""
    for width in WIDTHS:
        for vocabulary in (VOCABULARY, spec.vocab_size):
            try:
                if least <= width <= spec.hidden_size:
                    return dataclasses.replace(spec, hidden_size=width, vocab_size=vocabulary)
            except OuroborosError:
                continue
    return spec


def model_switches(spec: ModelSpec, *, context: int = TOKENS) -> Iterator[Switch]:
    """Every option of a model with what it changes.

    Args:
        spec: the model; it is tried out at a small width.
        context: tokens of longer texts. Options that show nothing are tried again in a wider model, and then in such a
            text.
    """
    small = narrow(spec)
    wide = narrow(spec, least=4 * small.hidden_size)
    longer = max(TOKENS, min(context, spec.max_position_embeddings))
    found = {switch.name: switch for switch in _tried_at(small, TOKENS)}
    for model, tokens in ((wide, TOKENS), (small, longer)):
        dead = {name for name, switch in found.items() if switch.dead}
        if dead and (model, tokens) != (small, TOKENS):
            found |= {switch.name: switch for switch in _tried_at(model, tokens, dead)}
    yield from found.values()


def _tried_at(spec: ModelSpec, tokens: int, among: Container[str] | None = None) -> Iterator[Switch]:
    before = behaviour(spec, tokens=tokens)

    def changes(changed: ModelSpec) -> str | None:
        return effect(before, behaviour(changed, before, tokens))

    settings = {"idle": dict(idle(spec)), "others": {"layout": _layouts(spec)}, "prefix": "model."}
    yield from switches(spec, changes, among=among, **settings)


def _layouts(spec: ModelSpec) -> tuple[str, ...]:
    """The layout with another loop, or another block."""
    schedule = spec.schedule
    return (schedule.with_loops(schedule.loops + 1).notation if schedule.is_looped else str(schedule.num_blocks + 1),)
