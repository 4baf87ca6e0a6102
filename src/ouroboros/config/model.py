"""What a model is: its schedule, the parts of a block, and what surrounds them."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tyro.conf import Fixed, Suppress, arg

from ouroboros.config.migrate import from_before_blocks, written_before_blocks
from ouroboros.config.needs import needs, positive, untried
from ouroboros.config.part import (
    FeedForwardPart,
    HeadPart,
    LoopPart,
    MixerPart,
    NormPart,
    Part,
    Place,
    ResidualPart,
    StemPart,
    TopologyPart,
    of_kind,
)
from ouroboros.config.parts.attention import AttentionSpec
from ouroboros.config.parts.feed_forward import FeedForwardSpec
from ouroboros.config.parts.head import LinearHeadSpec
from ouroboros.config.parts.norm import RMSNormSpec
from ouroboros.config.parts.residual import AdditiveResidualSpec
from ouroboros.config.parts.topology import ChainSpec
from ouroboros.errors import check, nearest
from ouroboros.schedule import Schedule, parse


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """The parts of a block: a mixer and a feed-forward network, each behind a norm and joined by a residual."""

    mixer: MixerPart = field(default_factory=AttentionSpec)
    ffn: FeedForwardPart = field(default_factory=FeedForwardSpec)
    norm: NormPart = field(default_factory=RMSNormSpec)
    residual: ResidualPart = field(default_factory=AdditiveResidualSpec)
    dropout: float = 0.0
    """Dropout of each sublayer's output in training."""

    def __post_init__(self) -> None:
        check(0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}")

    def at(self, place: Place) -> BlockSpec:
        """The block with what only its place in the layout tells its parts."""
        at = {name: getattr(self, name).at(place) for name in ("mixer", "ffn", "norm", "residual")}
        return dataclasses.replace(self, **at)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The specifications of all parts."""
        return self.mixer, self.ffn, self.norm, self.residual

    @property
    def sublayers(self) -> int:
        """The mixer, and the feed-forward network if there is one."""
        return 1 if self.ffn.absent else 2


@dataclass(frozen=True, kw_only=True)
class BlockOverride:
    """Blocks that differ from ``model.block`` in some options."""

    where: str
    """A segment's name in the layout (``wide`` in ``3 wide:(1)x2 3``), a block's number, or a range as ``0-2``."""
    set: dict[str, Any]
    """Options of the block by dotted path, for example ``{"ffn.intermediate_size": 1024}``."""

    def __hash__(self) -> int:
        return hash((self.where, json.dumps(self.set, sort_keys=True)))


LOOPED = needs("schedule.is_looped", True, say="a layout with a loop, for example --model.layout '1 (1)x2 1'")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A language model: a schedule of visits, the parts of a block, and what surrounds them."""

    layout: str = "6"
    """Schedule notation, for example ``"2 (2)x3 2"``; see docs/concepts/schedules.md."""
    vocab_size: int = 257
    """Tokens of the vocabulary; training takes the tokenizer's."""
    hidden_size: int = 256
    """Width of the stream."""
    max_position_embeddings: int = field(default=4096, metadata=untried("limits the length of a text"))
    """Longest context the model accepts, in tokens."""
    block: Annotated[BlockSpec, arg(name="")] = field(default_factory=BlockSpec)
    overrides: Suppress[Fixed[tuple[BlockOverride, ...]]] = ()
    """Blocks that differ; later ones win."""
    topology: TopologyPart = field(default_factory=ChainSpec)
    stem: Suppress[Fixed[tuple[StemPart, ...]]] = ()
    """What is done to the token embeddings, in order."""
    loop: Suppress[Fixed[tuple[LoopPart, ...]]] = field(default=(), metadata=LOOPED)
    """What enters at the boundaries of loops, in order."""
    head: HeadPart = field(default_factory=LinearHeadSpec)
    share_last_kv: bool = field(default=False, metadata=LOOPED)
    """Cache what the last loop's visits keep only; earlier loops read it for positions cached before the call. Smaller
    cache, approximate decoding (its cost is measured in docs/benchmarks.md)."""
    registers: int = 0
    """Learned prefix tokens that every position can see; they never see the text."""
    register_std: float | None = field(default=None, metadata=needs("registers", positive))
    """Standard deviation of the registers at the start; None means ``init_std``."""
    tie_embeddings: bool = True
    """Use the token embeddings as the output matrix."""
    init_std: float = 0.02
    """Standard deviation of every weight matrix at the start."""
    embedding_std: float | None = None
    """That of embeddings and the untied output matrix; None means ``init_std``."""
    head_std: float | None = None
    """That of the untied output matrix alone; None means as embeddings."""
    output_init: Literal["normal", "depth_scaled"] = "normal"
    """Output projections of mixers and feed-forward networks start as every matrix, or divided by the square root of
    the number of visits."""
    zero_init_outputs: bool = False
    """Start output projections at zero, so that every block starts as the identity."""

    def __post_init__(self) -> None:
        for name, least in (("vocab_size", 2), ("hidden_size", 1), ("max_position_embeddings", 1), ("registers", 0)):
            check(getattr(self, name) >= least, f"{name} must be >= {least}, got {getattr(self, name)}")
        check(
            self.register_std is None or self.register_std >= 0,
            f"register_std must be >= 0 or null, got {self.register_std}",
        )
        check(self.init_std > 0, f"init_std must be > 0, got {self.init_std}")
        for name in ("embedding_std", "head_std"):
            value = getattr(self, name)
            check(value is None or value > 0, f"{name} must be > 0 or null, got {value}")
        check(self.head_std is None or not self.tie_embeddings, "head_std needs tie_embeddings false: the head is tied")
        check(
            not (self.zero_init_outputs and self.output_init != "normal"),
            f"zero_init_outputs and output_init {self.output_init!r} exclude each other",
        )
        for name in ("stem", "loop"):
            kinds = [item.kind for item in getattr(self, name)]
            check(len(set(kinds)) == len(kinds), f"{name} has a part twice: {', '.join(kinds)}")
        forms = {block.residual.form for block in self.blocks}
        check(len(forms) == 1, "the residuals of all blocks must join to the same form of stream: they share it")
        for part in self.parts:
            part.check(self)

    def replace(self, **changes: Any) -> ModelSpec:
        """A copy with other options; those of :class:`BlockSpec` may be given directly, as on the command line."""
        names = {field.name for field in dataclasses.fields(BlockSpec)} & changes.keys()
        own = {name: changes.pop(name) for name in sorted(names)}
        block = dataclasses.replace(changes.pop("block", self.block), **own)
        return dataclasses.replace(self, block=block, **changes)

    @property
    def schedule(self) -> Schedule:
        """The visits of the layout.

        Raises:
            OuroborosError: the notation is wrong; says where and how to write it.
        """
        return parse(self.layout)

    @functools.cached_property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """The specification of every block, overrides applied."""
        schedule = self.schedule
        changes: list[dict[str, Any]] = [{} for _ in range(schedule.num_blocks)]
        for override in self.overrides:
            for block in schedule.blocks_at(override.where):
                changes[block] |= override.set
        places = [Place(segment, block) for segment in schedule.stored for block in segment.blocks]
        return tuple(_changed(self.block, change).at(place) for change, place in zip(changes, places, strict=True))

    @functools.cached_property
    def loop_parts(self) -> tuple[tuple[LoopPart, ...], ...]:
        """The loop parts of every looped segment, each at its place."""
        looped = [segment for segment in self.schedule.segments if segment.looped]
        return tuple(tuple(part.at(Place(segment)) for part in self.loop) for segment in looped)

    @property
    def parts(self) -> Iterator[Part]:
        """The specifications of all parts, those of equal blocks once."""
        for index, block in enumerate(self.blocks):
            if block not in self.blocks[:index]:
                yield from block.parts
        yield from (self.topology, *self.stem, *self.loop, self.head)

    @property
    def rotates(self) -> bool:
        """Whether mixers tell positions by rotation."""
        return not any(part.replaces_rotary for part in self.stem)

    def warnings(self) -> list[str]:
        """What a user of this model should know before training it."""
        return list(dict.fromkeys(text for part in self.parts for text in part.warnings(self)))

    @staticmethod
    def migrate(values: dict[str, Any]) -> dict[str, Any]:
        """What JSON of earlier versions means today."""
        return from_before_blocks(values) if written_before_blocks(values) else values


def _changed(block: BlockSpec, change: dict[str, Any]) -> BlockSpec:
    """``block`` with options by dotted path; a path to a part chooses its kind, or replaces all of it."""
    from ouroboros.config.codec import from_dict, to_dict

    if not change:
        return block
    values = to_dict(block)
    for path, value in change.items():
        *parents, name = path.split(".")
        inner = values
        for parent in parents:
            check(isinstance(inner.get(parent), dict), f"overrides: a block has no option {path!r}")
            inner = inner[parent]
        check(name in inner or not parents, f"overrides: a block has no option {path!r}{nearest(name, inner)}")
        if not parents and isinstance(inner.get(name), dict) and isinstance(value, str):
            present = getattr(from_dict(type(block), values, where="overrides"), name)
            value = to_dict(of_kind(present, value, f"overrides: {name}: "))
        inner[name] = value
    return from_dict(type(block), values, where="overrides")
