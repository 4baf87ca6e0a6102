"""Families of parts: what the specification of each says about itself, and the one registry of them.

A *part* is a mixer, a feed-forward network, a norm, a residual connection, a loop part, a stem part, a head or a
topology. Everything about it stands in its specification (here and in :mod:`ouroboros.config.parts`, without torch) and
in its module (in :mod:`ouroboros.nn`); no other file names it. The decorator :func:`part` registers both::

    @part(module="ouroboros.nn.attention:Attention")
    @dataclass(frozen=True, kw_only=True)
    class AttentionSpec(MixerPart):
        kind: Literal["attention"] = "attention"

The codec and the command line read from the registry which parts a field may hold. Costs count a multiply-add as two
operations and matrix products only, as ``FlopCounterMode`` does; ``width`` is the model's ``hidden_size``.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self, TypeVar

from tyro.conf import Suppress

from ouroboros.config.needs import needs, untried
from ouroboros.errors import check, nearest
from ouroboros.registry import load, systems

if TYPE_CHECKING:
    from ouroboros.config.model import ModelSpec
    from ouroboros.config.parts.rope import RopeSpec
    from ouroboros.schedule import Schedule, Segment

S = TypeVar("S", bound="type[Part]")
P = TypeVar("P", bound="Part")


class Place(NamedTuple):
    """Where in a layout a part stands."""

    segment: Segment
    """The segment of the block, or of the loop part."""
    block: int | None = None
    """The block's number; None for a loop part."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The specification of a part; its ``kind`` tells it from others of its family."""

    kind: Any

    def replace(self, **options: Any) -> Self:
        """A copy with other options."""
        return dataclasses.replace(self, **options)

    def at(self, place: Place) -> Self:
        """This part with what only its place tells; most parts are the same everywhere."""
        return self

    def check(self, model: ModelSpec) -> None:
        """Refuse a model that this part does not fit.

        Raises:
            OuroborosError: names the field and the fix.
        """

    def warnings(self, model: ModelSpec) -> Iterator[str]:
        """What a user of ``model`` should know before training it."""
        return iter(())

    @property
    def freezes(self) -> bool:
        """Whether its module has parameters that it never trains."""
        return False

    @property
    def sees_later(self) -> str:
        """Which option lets a position see later ones, and how; empty where none does."""
        return ""


_KINDS: dict[type[Part], dict[str, type[Part]]] = {}
_MODULES: dict[type[Part], Any] = {}


def part(*, module: Any) -> Callable[[S], S]:
    """Register the specification below under every kind it names, with the module that is built from it.

    Args:
        module: what is called with the specification and whatever its family is built from; ``"module:attribute"`` is
            imported on first use, so that specifications need no torch.
    """

    def register(spec: S) -> S:
        members = _KINDS.setdefault(family(spec), {})
        for kind in typing.get_args(typing.get_type_hints(spec)["kind"]):
            check(
                members.get(kind, spec).__qualname__ == spec.__qualname__,
                f"{kind!r} is registered twice: by {members.get(kind)} and {spec}",
            )
            members[kind] = spec
        _MODULES[spec] = module
        # On the command line the kind is chosen before the options are known, see ouroboros.verbs.parts.
        spec.__annotations__["kind"] = Suppress[typing.get_type_hints(spec)["kind"]]  # pyrefly: ignore
        return spec

    return register


def family(spec: type) -> type[Part]:
    """The family of a specification: the class directly below :class:`Part`."""
    return spec.__mro__[spec.__mro__.index(Part) - 1]


def is_family(hint: Any) -> bool:
    """Whether a field of this type may hold any part of a family."""
    return isinstance(hint, type) and Part in hint.__bases__


def kinds(of: type[P]) -> dict[str, type[P]]:
    """The registered members of a family by kind, the shipped ones first."""
    import ouroboros.config.parts  # noqa: F401  registers what the library brings

    systems()  # so do packages installed beside it
    return dict(_KINDS.get(of, {}))  # pyrefly: ignore


def of_kind(present: P, kind: str, where: str = "") -> P:
    """The part of this kind in the family of ``present``; what its specification shares with that one stays. ``where``
    begins an error's text.

    Raises:
        OuroborosError: there is no such part; offers the nearest name.
    """
    shared = family(type(present))
    members: dict[str, Any] = kinds(shared)
    check(kind in members, f"{where}unknown kind {kind!r}{nearest(kind, members)}")
    if members[kind] is type(present):
        return present.replace(kind=kind)
    values = {field.name: getattr(present, field.name) for field in dataclasses.fields(shared)}
    return members[kind](**{**values, "kind": kind})


def module_of(spec: Part) -> Any:
    """The module class that a specification is built with."""
    target = _MODULES[type(spec)]
    if isinstance(target, str):
        target = _MODULES[type(spec)] = load(target)
    return target


def build(spec: Part, *arguments: Any) -> Any:
    """The module of a part; ``arguments`` are what its family is built from, see :mod:`ouroboros.nn.part`."""
    return module_of(spec)(spec, *arguments)


class Heads(NamedTuple):
    """Attention heads, for tools that read them of every model."""

    queries: int
    cached: int
    """Heads of what a cache keeps."""
    width: int
    """Channels per head."""


@dataclass(frozen=True, kw_only=True)
class MixerPart(Part):
    """What mixes tokens over time."""

    reads_other: ClassVar[bool] = False
    """Whether it also looks at another stream, which the topology names."""
    keeps: ClassVar[Literal["keys", "state"]] = "keys"
    """What a cache keeps of a visit: keys and values that grow with the text and need a mask, or a state of constant
    size, which is causal by itself."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Which of the values that visits carry it reads, by the name that a stem part gives them."""
        return ()

    def heads(self, width: int) -> Heads:
        """Attention heads; a mixer without any counts as one of full width."""
        return Heads(1, 1, width)

    def rotary(self, width: int) -> tuple[RopeSpec, int] | None:
        """The rotary embedding and the channels per head it is made for; None for a mixer that rotates nothing."""
        return None

    @property
    def looks_back(self) -> int | None:
        """How many tokens a token sees, itself included; None: all that precede it."""
        return None

    @property
    def own_attention(self) -> str:
        """Why no other tool can compute its attention and keep its keys and values, in words that follow its kind;
        empty where one can, whose function the module then takes from ``visit.attend``."""
        return "keeps a state of constant size" if self.keeps == "state" else "computes its attention itself"

    @property
    def rebuilds_keys(self) -> bool:
        """Whether a cache keeps latents whose keys are built anew at each step, with the positions of all of them."""
        return False

    def parameters(self, width: int) -> int:
        """Trainable numbers of one mixer."""
        raise NotImplementedError

    def flops(self, width: int, context: int, registers: int = 0) -> int:
        """Operations for one token of a text in which a token attends to ``context`` positions, behind registers."""
        raise NotImplementedError

    def loop_flops(self, width: int) -> int:
        """Operations for one token that a visit within a loop takes besides, for what the loop parts hand to it."""
        return 0

    @property
    def unlooped(self) -> MixerPart:
        """What computes the same where no loop part hands anything to a visit, for models without a loop."""
        return self

    def prefix_flops(self, width: int) -> tuple[int, int]:
        """What registers cost besides their own visit: operations for each register, and for each token of the text."""
        return 0, 0

    @property
    def flops_are_rounded(self) -> bool:
        """Whether only some tokens do some work, so that operations per token are a mean, rounded down."""
        return False

    def cache_values(self, width: int) -> int:
        """Numbers that a cache gains with each token."""
        return 0

    def state_values(self, width: int) -> int:
        """Numbers of constant-size state per sequence."""
        return 0

    def recent_values(self, width: int) -> int:
        """Numbers that filters over tokens remember per sequence, beside keys and values."""
        return 0


@dataclass(frozen=True, kw_only=True)
class FeedForwardPart(Part):
    """What maps each position by itself."""

    absent: ClassVar[bool] = False
    """Whether a block of this kind has no feed-forward network, and no norm before it."""

    def parameters(self, width: int) -> int:
        """Trainable numbers of one network."""
        raise NotImplementedError

    def flops(self, width: int) -> int:
        """Operations for one token."""
        raise NotImplementedError

    def loop_flops(self, width: int) -> int:
        """Operations for one token that a visit within a loop takes besides, for what the loop parts hand to it."""
        return 0

    @property
    def unlooped(self) -> FeedForwardPart:
        """What computes the same where no loop part hands anything to a visit, for models without a loop."""
        return self

    @property
    def hidden_width(self) -> int:
        """Width of the hidden layer, for tools that read it of every model."""
        return 0


@dataclass(frozen=True, kw_only=True)
class NormPart(Part):
    """Normalisation of the stream before each sublayer and before the head."""

    placement: Literal["pre", "sandwich", "final"] = "pre"
    """``pre`` normalises what a sublayer reads; ``sandwich`` also what it returns, before the residual addition;
    ``final`` leaves the norm before the head alone."""
    eps: float = 1e-6
    """Added to the variance or mean square before its root is taken."""
    depth_scale: bool = field(
        default=False,
        metadata=needs("placement", "pre", "sandwich")
        | untried("leaves the first block as it is, which may be the only one"),
    )
    """Divide what a block's norms return by the square root of the block's depth, which is its number counted from 1;
    later blocks then change the stream less. The norm before the head is left as it is."""
    depth: int | None = field(default=None, metadata=needs("depth_scale"))
    """Another depth than the block's number, for overrides of single blocks; None means the number."""

    def __post_init__(self) -> None:
        check(self.eps > 0, f"norm.eps must be > 0, got {self.eps}")
        check(self.depth is None or self.depth >= 1, f"norm.depth must be >= 1 or null, got {self.depth}")

    def at(self, place: Place) -> Self:
        counts = self.depth_scale and self.depth is None and place.block is not None
        return self.replace(depth=place.block + 1) if counts else self  # pyrefly: ignore

    @property
    def final(self) -> Self:
        """The norm before the head."""
        return self.replace(depth_scale=False)

    @property
    def factor(self) -> float:
        """What is multiplied to the result."""
        return self.depth**-0.5 if self.depth_scale and self.depth is not None else 1.0

    def parameters(self, width: int) -> int:
        """Trainable numbers of one norm."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ResidualPart(Part):
    """How a sublayer's output joins the stream, and what form the stream has."""

    @property
    def form(self) -> str:
        """What form of stream it joins to; residuals of one model share it."""
        return "vector"

    @property
    def channels(self) -> int:
        """Vectors of ``hidden_size`` that the stream is made of; with more than one, a reader makes one of them."""
        return 1

    def parameters(self, width: int) -> int:
        """Trainable numbers of one residual connection."""
        return 0

    def flops(self, width: int) -> int:
        """Operations of one residual connection for one token."""
        return 0

    def entrance_parameters(self, width: int) -> int:
        """Trainable numbers of what is done to the stream before a block's first sublayer."""
        return 0

    def reader_parameters(self, width: int) -> int:
        """Trainable numbers of what reads the stream, for a block and for the head."""
        return 0

    def reader_values(self, width: int) -> int:
        """Numbers that one reading remembers per sequence of earlier tokens."""
        return 0

    def start_parameters(self, width: int) -> int:
        """Trainable numbers of what makes the stream of the embeddings."""
        return 0

    def start_values(self, width: int) -> int:
        """Numbers that the start of the stream remembers per sequence of earlier tokens."""
        return 0


@dataclass(frozen=True, kw_only=True)
class LoopPart(Part):
    """What enters at the boundaries of a loop. The parts of a loop act in their order, each at most once."""

    injects: ClassVar[bool] = False
    """Whether the state before the first loop enters every loop, which lets gradients reach what made that state even
    if backpropagation is truncated to the last loops."""

    hands: ClassVar[str] = ""
    """What it hands to the visits of a loop, in a word that parts of blocks ask for; empty for nothing."""

    @property
    def watches(self) -> tuple[int, ...]:
        """Blocks before the loop whose last output the part is given, as ``block.NUMBER`` among what loop parts carry;
        known once the part stands at its place."""
        return ()

    @property
    def saves(self) -> bool:
        """Whether some tokens may do without later loops, so that operations are counted at their most."""
        return False

    @classmethod
    def neutral(cls) -> tuple[LoopPart, ...]:
        """Settings with which the part, at its start, computes bit for bit what its absence computes."""
        return ()

    def parameters(self, width: int, loops: int) -> int:
        """Trainable numbers for a segment of ``loops`` loops."""
        return 0

    def flops(self, width: int, loops: int) -> int:
        """Operations in a segment of ``loops`` loops for one token and each channel of the stream."""
        return 0

    def text_flops(self, width: int, loops: int) -> int:
        """Operations in a segment of ``loops`` loops that are done once for a whole text, however long it is."""
        return 0

    def recent_values(self, width: int) -> int:
        """Numbers that each loop remembers per sequence of earlier tokens, with the visit that begins it."""
        return 0


@dataclass(frozen=True, kw_only=True)
class StemPart(Part):
    """What is done to the token embeddings before the first visit, in order."""

    replaces_rotary: ClassVar[bool] = False
    """Whether positions enter here, and mixers therefore rotate nothing."""
    provides: ClassVar[str] = ""
    """What it puts among the values that visits carry, by name; empty for nothing."""
    by_token: ClassVar[bool] = False
    """Whether what it makes of an embedding depends on that embedding alone, so that a table of embeddings that it has
    been applied to does the same."""

    def parameters(self, model: ModelSpec) -> int:
        """Trainable numbers."""
        return 0

    def flops(self, model: ModelSpec) -> int:
        """Operations for one token."""
        return 0

    def recent_values(self, width: int) -> int:
        """Numbers that it remembers per sequence of earlier tokens."""
        return 0

    def longest(self, model: ModelSpec) -> int | None:
        """The longest text in tokens that it can take; None for any length."""
        return None


@dataclass(frozen=True, kw_only=True)
class HeadPart(Part):
    """What makes logits of the final states, with the output matrix of (vocabulary, ``hidden_size``)."""

    def parameters(self, model: ModelSpec) -> int:
        """Trainable numbers besides the output matrix."""
        return 0

    def flops(self, model: ModelSpec) -> int:
        """Operations for one token."""
        return 2 * model.vocab_size * model.hidden_size


@dataclass(frozen=True, kw_only=True)
class TopologyPart(Part):
    """How visits are wired."""

    def crossed(self, model: ModelSpec) -> frozenset[int]:
        """Blocks that are shown another stream than the one they run on."""
        return frozenset()

    def check(self, model: ModelSpec) -> None:
        for number, block in enumerate(model.blocks):
            check(
                not block.mixer.reads_other or number in self.crossed(model),
                f"mixer {block.mixer.kind!r} of block {number} looks at another stream, and topology {self.kind!r}"
                " shows it none: see topology helix in docs/systems/crawler.md",
            )

    def parameters(self, model: ModelSpec) -> int:
        """Trainable numbers besides blocks and loop parts."""
        return 0

    def flops(self, model: ModelSpec, schedule: Schedule) -> int:
        """Operations for one token besides those of blocks and loop parts."""
        return 0
