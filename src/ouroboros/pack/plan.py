"""Which tensor of a model gets which codes: ordered rules, of which the first that fits a tensor decides.

A rule picks tensors by name, role, place and size, and says what becomes of them. Eight bits for blocks of loops and
six for the others are one line::

    DEFAULT.first(Rule(role="matrix", place="looped", bits=8), Rule(role="matrix", place="once", bits=6))
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ouroboros.config.widths import PLACES, parse_widths
from ouroboros.errors import OuroborosError, check
from ouroboros.model.executor import Decoder
from ouroboros.optim import parameter_roles
from ouroboros.optim.groups import ROLES
from ouroboros.pack.quantize import SQUARES, Clip

BUFFER = "buffer"
"""The role of what a model stores and does not train."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor of a model, as rules see it."""

    name: str
    tensor: Tensor
    role: str
    """``matrix``, ``embedding``, ``vector`` or ``scalar`` as for the optimiser, or ``buffer``."""
    place: str
    """``once``: in a block that is visited once. ``looped``: in a block that is visited several times, or at the
    boundaries of a loop. ``outside``: anywhere else, such as embeddings, stem, bridges and head."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What becomes of the tensors that it fits: all conditions that are given have to hold."""

    where: str = "*"
    """Pattern of the name, such as ``*.mlp.*``."""
    role: str | None = None
    """See :class:`Entry`."""
    place: Literal["once", "looped", "outside"] | None = None
    """See :class:`Entry`."""
    at_most: int | None = None
    """Numbers that the tensor has at most."""
    keep: Literal["float16", "float32"] | None = None
    """Store the numbers themselves in this format; what follows is then not used."""
    bits: int = 8
    """Of a code, 2 to 8."""
    group: int = 0
    """Columns that share a step; 0: all of a row."""
    clip: Clip = SQUARES
    """How steps are chosen."""
    method: Literal["gptq", "rounding"] = "gptq"
    """``gptq`` makes up for errors by what the map reads. Tensors that are not applied as maps, such as tables that are
    only looked up and filters over tokens, are rounded in any case; maps that are stacked in one tensor are coded each
    by itself."""

    def __post_init__(self) -> None:
        roles = (*ROLES, BUFFER)
        check(self.role is None or self.role in roles, f"rule: role is one of {', '.join(roles)}, not {self.role!r}")
        check(self.place in (None, *PLACES), f"rule: place is one of {', '.join(PLACES)}, not {self.place!r}")
        check(2 <= self.bits <= 8, f"rule: codes have 2 to 8 bits, got {self.bits}")
        check(self.group >= 0, f"rule: group is a number of columns, or 0 for whole rows, got {self.group}")
        check(self.keep in (None, "float16", "float32"), f"rule: keep is float16 or float32, not {self.keep!r}")
        check(self.method in ("gptq", "rounding"), f"rule: method is gptq or rounding, not {self.method!r}")

    def fits(self, entry: Entry) -> bool:
        """Whether it picks the tensor."""
        return (
            fnmatch.fnmatchcase(entry.name, self.where)
            and self.role in (None, entry.role)
            and self.place in (None, entry.place)
            and (self.at_most is None or entry.tensor.numel() <= self.at_most)
        )


@dataclass(frozen=True)
class Plan:
    """Rules in their order."""

    rules: tuple[Rule, ...]

    def first(self, *rules: Rule) -> Plan:
        """The same plan behind other rules, which go before its own."""
        return Plan((*rules, *self.rules))

    def mixed(self, model: Any, texts: Sequence[str], option: str) -> Plan:
        """The same plan with other bits for some of the tensors that it codes; what it keeps as numbers stays so.

        Args:
            model: whose tensors these are.
            texts: as of :func:`bits_by_name`.
            option: what errors call them.

        Raises:
            OuroborosError: as of :meth:`choose` and :func:`bits_by_name`.
        """
        coded = {name: (entry, rule) for name, (entry, rule) in self.choose(model).items() if rule.keep is None}
        bits = bits_by_name([entry for entry, _ in coded.values()], texts, option)
        return self.first(*(dataclasses.replace(coded[name][1], where=name, bits=bits[name]) for name in bits))

    def choose(self, model: Any) -> dict[str, tuple[Entry, Rule]]:
        """Every tensor that the model stores, and its rule, by name; a tied parameter under its first name.

        Raises:
            OuroborosError: tensors that no rule fits, or a rule whose pattern is the name of no tensor.
        """
        found = entries(model)
        for rule in self.rules:
            check(
                rule.where == "*" or any(fnmatch.fnmatchcase(entry.name, rule.where) for entry in found),
                f"plan: {rule.where!r} is the name of no tensor; a name is, for example, {found[0].name}",
            )
        chosen = {entry.name: (entry, next((rule for rule in self.rules if rule.fits(entry)), None)) for entry in found}
        left = [name for name, (_, rule) in chosen.items() if rule is None]
        if left:
            raise OuroborosError(f"plan: no rule says what becomes of {', '.join(left)}: add one at the end")
        return {name: (entry, rule) for name, (entry, rule) in chosen.items() if rule is not None}


def uniform(bits: int, *, tables: int | None = None, group: int = 0, clip: Clip = SQUARES) -> Plan:
    """Codes of so many bits for every map, and for every table of ids; small tensors and vectors are kept as float16,
    and numbers that steer a part as a whole as float32.

    Args:
        bits: of the codes of maps.
        tables: of the codes of embeddings, heads and other tables; None: as many.
        group: columns of a map that share a step; 0: all of a row.
        clip: how steps are chosen.
    """
    return Plan(
        (
            Rule(role=BUFFER, keep="float32"),
            Rule(role="scalar", keep="float32"),
            Rule(at_most=512, keep="float16"),
            Rule(role="vector", at_most=2**16, keep="float16"),
            Rule(role="vector", bits=8),
            Rule(role="embedding", bits=tables or bits, clip=clip),
            Rule(role="matrix", bits=bits, group=group, clip=clip),
        )
    )


DEFAULT = uniform(8)
"""Eight bits, which cost next to nothing in quality."""


def bits_by_name(coded: Sequence[Entry], texts: Sequence[str], option: str) -> dict[str, int]:
    """Bits by name, for those tensors for which one of ``texts`` gives some; of several, the first that fits decides.

    Args:
        coded: the tensors that get codes.
        texts: ``WHICH=BITS`` each, see :func:`~ouroboros.config.widths.parse_widths`.
        option: what errors call them.

    Raises:
        OuroborosError: a text of another form, or one that decides for no tensor.
    """
    found: dict[str, int] = {}
    for text, (which, bits) in zip(texts, parse_widths(texts, option), strict=True):
        rule = Rule(place=which) if which in PLACES else Rule(where=which)  # pyrefly: ignore
        new = {entry.name: bits for entry in coded if rule.fits(entry) and entry.name not in found}
        hint = f"such a tensor is, for example, {coded[-1].name} ({coded[-1].place})" if coded else "there is none"
        check(bool(new), f"{option}: {text!r} decides for no tensor that gets codes, or others do before it; {hint}")
        found |= new
    return found


def entries(model: Any) -> list[Entry]:
    """What a model stores: parameters, each under its first name, and buffers.

    Raises:
        OuroborosError: a parameter whose part does not say what it is.
    """
    path = next(name for name, module in model.named_modules() if isinstance(module, Decoder))
    visited = [visit.block for visit in model.schedule.visits]
    parts = {f"{path}.layers.{block}.": "looped" if visited.count(block) > 1 else "once" for block in set(visited)}
    parts[f"{path}.loops."] = "looped"

    def place(name: str) -> str:
        return next((place for prefix, place in parts.items() if name.startswith(prefix)), "outside")

    roles = parameter_roles(model)
    found = [
        Entry(name=name, tensor=tensor.detach(), role=roles[name], place=place(name))
        for name, tensor in model.named_parameters()
    ]
    stored = model.state_dict()
    found += [
        Entry(name=name, tensor=tensor.detach(), role=BUFFER, place=place(name))
        for name, tensor in model.named_buffers()
        if name in stored
    ]
    return found
