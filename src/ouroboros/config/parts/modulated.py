"""Linear maps that a loop modulates: a low-rank addition whose core another part hands to each visit.

A modulated map computes ``y = W x + alpha / rank * B M A x`` (Controller, section 2.3). A and B, the bases, belong to
the block. Their core M, a diagonal or a full matrix (LoRA-XS, arXiv 2405.17604), comes from a loop part, which makes it
of the state that a loop begins with, or learns it for each loop.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ouroboros.config.part import FeedForwardPart, LoopPart, MixerPart, part
from ouroboros.config.parts.attention import AttentionSpec
from ouroboros.config.parts.feed_forward import FeedForwardSpec
from ouroboros.config.parts.pooling import PooledPart
from ouroboros.errors import check

if TYPE_CHECKING:
    from ouroboros.config.model import ModelSpec

CORES = "cores"
"""What loop parts hand to modulated maps."""
Core = Literal["diagonal", "full"]
MIXER_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN_TARGETS = ("gate_proj", "up_proj", "down_proj")
TARGETS = (*MIXER_TARGETS, *FFN_TARGETS)
"""The modulated maps of a block, in the order of the published tables."""


@part(module="ouroboros.nn.modulated:ModulatedAttention")
@dataclass(frozen=True, kw_only=True)
class ModulatedAttentionSpec(AttentionSpec):
    """Attention whose maps to queries, keys, values and output are modulated by the loop."""

    kind: Literal["modulated_attention"] = "modulated_attention"  # pyrefly: ignore[bad-override]
    rank: int = 32
    """Rank of the addition to each map."""
    alpha: float = 16.0
    """The addition is multiplied by ``alpha / rank``."""
    bases: Literal["frozen", "trained"] = "frozen"
    """Whether A and B stay as they are, as published, or are trained."""
    rows: int | None = None
    """A and B of their own for each of this many loops; later loops use the last ones. None means the same A and B for
    all loops."""
    core: Core = "diagonal"
    """What stands between A and B: a diagonal, as published, or a full matrix of ``rank`` times ``rank`` numbers. The
    loop part that hands it has to make the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bases("mixer", self.rank, self.alpha, self.rows)

    def check(self, model: ModelSpec) -> None:
        super().check(model)
        _check_modulation(model)

    @property
    def freezes(self) -> bool:
        return self.bases == "frozen"

    def bases_parameters(self, width: int) -> int:
        """Numbers in A and B of all maps, for one loop."""
        queries, keys = self.num_heads * self.head_width(width), self.kv_heads * self.head_width(width)
        return self.rank * (2 * (width + queries) + 2 * (width + keys))

    def parameters(self, width: int) -> int:
        return super().parameters(width) + (self.rows or 1) * self.bases_parameters(width)

    def flops(self, width: int, context: int, registers: int = 0) -> int:
        cores = len(MIXER_TARGETS) * self.rank**2 if self.core == "full" else 0
        return super().flops(width, context, registers) + 2 * (self.bases_parameters(width) + cores)


@part(module="ouroboros.nn.modulated:ModulatedFeedForward")
@dataclass(frozen=True, kw_only=True)
class ModulatedFeedForwardSpec(FeedForwardPart):
    """A gated feed-forward network, ``down(silu(gate x) * (up x))`` or with ``gelu``, whose three maps are modulated by
    the loop."""

    gated: ClassVar[bool] = True

    kind: Literal["modulated_swiglu", "modulated_geglu"] = "modulated_swiglu"
    intermediate_size: int = 512
    """Width of the hidden layer."""
    bias: bool = False
    """Add biases to all maps."""
    dropout: float = 0.0
    """Dropout of the network's output in training, besides that of every sublayer (``model.dropout``)."""
    rank: int = 32
    """Rank of the addition to each map."""
    alpha: float = 16.0
    """The addition is multiplied by ``alpha / rank``."""
    bases: Literal["frozen", "trained"] = "frozen"
    """Whether A and B stay as they are, as published, or are trained."""
    rows: int | None = None
    """A and B of their own for each of this many loops; later loops use the last ones. None means the same A and B for
    all loops."""
    core: Core = "diagonal"
    """What stands between A and B: a diagonal, as published, or a full matrix of ``rank`` times ``rank`` numbers. The
    loop part that hands it has to make the same."""

    def __post_init__(self) -> None:
        check(self.intermediate_size >= 1, f"ffn.intermediate_size must be >= 1, got {self.intermediate_size}")
        check(0 <= self.dropout < 1, f"ffn.dropout must be in [0, 1), got {self.dropout}")
        _check_bases("ffn", self.rank, self.alpha, self.rows)

    def check(self, model: ModelSpec) -> None:
        _check_modulation(model)

    @property
    def freezes(self) -> bool:
        return self.bases == "frozen"

    @property
    def hidden_width(self) -> int:
        return self.intermediate_size

    @property
    def plain(self) -> FeedForwardSpec:
        """The network without what modulates it."""
        kinds: dict[str, Literal["swiglu", "geglu"]] = {"modulated_swiglu": "swiglu", "modulated_geglu": "geglu"}
        return FeedForwardSpec(
            kind=kinds[self.kind], intermediate_size=self.intermediate_size, bias=self.bias, dropout=self.dropout
        )

    def bases_parameters(self, width: int) -> int:
        """Numbers in A and B of all maps, for one loop."""
        return len(FFN_TARGETS) * self.rank * (width + self.intermediate_size)

    def parameters(self, width: int) -> int:
        return self.plain.parameters(width) + (self.rows or 1) * self.bases_parameters(width)

    def flops(self, width: int) -> int:
        cores = len(FFN_TARGETS) * self.rank**2 if self.core == "full" else 0
        return self.plain.flops(width) + 2 * (self.bases_parameters(width) + cores)


@dataclass(frozen=True, kw_only=True)
class _CoresPart(LoopPart):
    """A loop part that hands a core for every modulated map."""

    hands: ClassVar[str] = CORES

    rank: int = 32
    """The ``rank`` of the modulated maps of the blocks."""
    rows: int | None = None
    """Rows of the table of loops; None means the layout's loops. Later loops use the last row."""

    def __post_init__(self) -> None:
        check(self.rank >= 1, f"loop.{self.kind}.rank must be >= 1, got {self.rank}")
        check(self.rows is None or self.rows >= 1, f"loop.{self.kind}.rows must be >= 1, got {self.rows}")

    @property
    def makes(self) -> Core:
        """Which kind of core it hands."""
        return "diagonal"

    @property
    def core_values(self) -> int:
        """Numbers of the cores of all maps."""
        return len(TARGETS) * self.rank ** (2 if self.makes == "full" else 1)

    def check(self, model: ModelSpec) -> None:
        others = [part.kind for part in model.loop if part.hands == self.hands and part.kind != self.kind]
        both = f"loop.{self.kind} and loop.{', loop.'.join(others)} both hand what stands between A and B"
        check(not others, f"{both}: leave one of them out")
        wide = model.block.residual.channels > 1
        check(not wide, f"loop.{self.kind} needs a residual whose stream is one vector: --model.residual additive")
        for number in _looped(model):
            block = model.blocks[number]
            for name, found in (("mixer", block.mixer), ("ffn", block.ffn)):
                kind = {"mixer": "modulated_attention", "ffn": "modulated_swiglu"}[name]
                check(
                    isinstance(found, ModulatedAttentionSpec | ModulatedFeedForwardSpec),
                    f"loop.{self.kind} needs modulated maps in every looped block, and {name} of block {number} is"
                    f" {found.kind!r}: name the loop in the layout, as in '1 loop:(1)x2 1', and give"
                    f" --model.at.loop.{name} {kind}",
                )
                assert isinstance(found, ModulatedAttentionSpec | ModulatedFeedForwardSpec)
                rank, core = found.rank, found.core
                check(
                    rank == self.rank,
                    f"loop.{self.kind}.rank is {self.rank}, and {name}.rank of block {number} {rank}: they must agree",
                )
                check(
                    core == self.makes,
                    f"loop.{self.kind} makes a {self.makes} core, and {name}.core of block {number} is {core!r}: give"
                    f" --model.at.loop.{name}.core {self.makes}, or choose another loop part",
                )


@part(module="ouroboros.nn.modulated:StaticCores")
@dataclass(frozen=True, kw_only=True)
class StaticDiagonalsSpec(_CoresPart):
    """A learned diagonal for each loop and each modulated map, the same for every text; zero at the start."""

    kind: Literal["static_diagonals"] = "static_diagonals"

    def parameters(self, width: int, loops: int) -> int:
        return (self.rows or loops) * self.core_values


@part(module="ouroboros.nn.modulated:StaticCores")
@dataclass(frozen=True, kw_only=True)
class StaticCoresSpec(StaticDiagonalsSpec):
    """A learned matrix of ``rank`` times ``rank`` numbers between A and B for each loop and each modulated map, the
    same for every text; zero at the start (LoRA-XS, arXiv 2405.17604)."""

    kind: Literal["static_cores"] = "static_cores"  # pyrefly: ignore[bad-override]

    @property
    def makes(self) -> Core:
        return "full"


@part(module="ouroboros.nn.modulated:Controller")
@dataclass(frozen=True, kw_only=True)
class ControllerSpec(_CoresPart, PooledPart):
    """A small network that makes the cores of each loop of the state that begins it and of the loop's number; zero
    at the start (Ouroboros, arXiv 2604.02051)."""

    kind: Literal["controller"] = "controller"
    style: int = 128
    """Numbers that the loop's number is embedded in, and that the cores are made of."""
    core: Core = "diagonal"
    """What it makes: diagonals, as published, or full matrices."""

    def __post_init__(self) -> None:
        _CoresPart.__post_init__(self)
        PooledPart.__post_init__(self)
        check(self.style >= 1, f"loop.controller.style must be >= 1, got {self.style}")

    def check(self, model: ModelSpec) -> None:
        _CoresPart.check(self, model)
        PooledPart.check(self, model)

    @property
    def makes(self) -> Core:
        return self.core

    def parameters(self, width: int, loops: int) -> int:
        s = self.style
        vectors = 2 * s + (self.rows or loops) * s + 2 * s + s
        return vectors + self.matrices(width)

    def matrices(self, width: int) -> int:
        s = self.style
        return width * 2 * s + 3 * s * 2 * s + 2 * s * s + s * self.core_values


def _check_bases(family: str, rank: int, alpha: float, rows: int | None) -> None:
    check(rank >= 1, f"{family}.rank must be >= 1, got {rank}")
    check(alpha > 0, f"{family}.alpha must be > 0, got {alpha}")
    check(rows is None or rows >= 1, f"{family}.rows must be >= 1 or null, got {rows}")


def _looped(model: ModelSpec) -> set[int]:
    return {block for segment in model.schedule.segments if segment.looped for block in segment.blocks}


def _check_modulation(model: ModelSpec) -> None:
    """Modulated maps need someone who hands them diagonals, in every block that has them."""
    looped = _looped(model) - {b for segment in model.schedule.segments if not segment.looped for b in segment.blocks}
    for number, block in enumerate(model.blocks):
        for name, found in (("mixer", block.mixer), ("ffn", block.ffn)):
            if isinstance(found, ModulatedAttentionSpec | ModulatedFeedForwardSpec):
                check(
                    number in looped,
                    f"{name} {found.kind!r} of block {number} is modulated by a loop, and is visited outside of one:"
                    " name the loop in the layout, as in '1 loop:(1)x2 1', and give the option as --model.at.loop."
                    f"{name}",
                )
                check(
                    any(part.hands == CORES for part in model.loop),
                    f"{name} {found.kind!r} of block {number} needs a loop part that hands it diagonals or cores:"
                    " --model.loop.controller, --model.loop.static-diagonals or --model.loop.static-cores",
                )


def modulated(
    model: ModelSpec,
    loop: tuple[LoopPart, ...],
    *,
    rank: int,
    alpha: float,
    trained: bool = False,
    by_loop: bool = False,
) -> ModelSpec:
    """``model`` with the parts ``loop`` in its loops, and with modulated maps in every looped block if one of the parts
    hands cores; without such a part the blocks stay plain.

    Args:
        model: has a layout with a loop.
        loop: of all its loops.
        rank: of the modulated maps.
        alpha: of the modulated maps.
        trained: whether A and B are trained.
        by_loop: whether each loop has A and B of its own.

    Raises:
        OuroborosError: looped blocks are no gated ones with plain attention.
    """
    from ouroboros.config.codec import to_dict
    from ouroboros.config.model import BlockOverride

    core = next((part.makes for part in loop if isinstance(part, _CoresPart)), None)
    if core is None:
        return dataclasses.replace(model, loop=loop)
    own = {"rank": rank, "alpha": alpha, "bases": "trained" if trained else "frozen", "core": core}
    overrides = list(model.overrides)
    for segment in (segment for segment in model.schedule.stored if segment.looped):
        rows = segment.loops if by_loop else None
        changes = {number: _modulated_parts(model, number, {**own, "rows": rows}) for number in segment.blocks}
        one = segment.name and len({tuple(change.values()) for change in changes.values()}) == 1
        places = {segment.name: changes[segment.first_block]} if one else {str(n): c for n, c in changes.items()}
        overrides += [
            BlockOverride(where=where, set={name: to_dict(part) for name, part in change.items()})
            for where, change in places.items()
        ]
    return dataclasses.replace(model, loop=loop, overrides=tuple(overrides))


def _modulated_parts(model: ModelSpec, number: int, own: dict[str, Any]) -> dict[str, MixerPart | FeedForwardPart]:
    """Mixer and feed-forward network of a block, modulated."""
    mixer, ffn = model.blocks[number].mixer, model.blocks[number].ffn
    gates = {"swiglu": "modulated_swiglu", "geglu": "modulated_geglu"}
    check(
        mixer.kind == "attention" and ffn.kind in gates,
        f"mixer {mixer.kind!r} with ffn {ffn.kind!r}: only attention with swiglu or geglu can be modulated",
    )
    plain = {field.name: getattr(mixer, field.name) for field in dataclasses.fields(mixer) if field.name != "kind"}
    shared = {name: getattr(ffn, name) for name in ("intermediate_size", "bias", "dropout")}
    return {
        "mixer": ModulatedAttentionSpec(**plain, **own),
        "ffn": ModulatedFeedForwardSpec(kind=gates[ffn.kind], **shared, **own),  # pyrefly: ignore
    }
