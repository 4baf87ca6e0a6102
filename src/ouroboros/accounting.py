"""Exact cost of a model from its specification alone: parameters, arithmetic, cache.

Parameters are a sum over blocks, arithmetic and cache sums over visits; what each part adds, its specification says
(:mod:`ouroboros.config.part`). The harness (:mod:`ouroboros.eval.harness`) proves every number against the built model.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from ouroboros.config import BlockSpec, LoopTraining, ModelSpec, fields_by_path
from ouroboros.config.part import Part, Place, of_kind
from ouroboros.schedule import Schedule, Segment


@dataclass(frozen=True)
class Cost:
    """What a model stores, computes and remembers."""

    parameters: int
    embedding_parameters: int
    """Share of ``parameters`` in the token embedding and the untied output matrix."""
    flops_per_token: int
    """Forward operations for one token that attends to ``context`` positions, without those that are done once for a
    whole text (:func:`text_flops`); where tokens may do without later loops
    (:attr:`~ouroboros.config.LoopPart.saves`), of one that does not."""
    training_flops_per_token: int
    """Forward and backward, three times the forward: of training with this loop count (:func:`training_flops` of other
    trainings)."""
    cache_values_per_token: int
    """Numbers a cache gains with each token."""
    state_values: int
    """Numbers of constant-size state per sequence."""
    context: int

    def cache_bytes_per_token(self, bytes_per_value: int = 4) -> int:
        return self.cache_values_per_token * bytes_per_value

    def state_bytes(self, bytes_per_value: int = 4) -> int:
        return self.state_values * bytes_per_value


def cost(spec: ModelSpec, *, context: int = 512, loops: int | None = None) -> Cost:
    """The exact cost of ``spec`` when a token attends to ``context`` positions, registers not counted.

    Args:
        spec: the model.
        context: attended positions; a causal window of T tokens has (T + 1) / 2 on average.
        loops: another loop count than the layout's.
    """
    width, run = spec.hidden_size, spec.schedule if loops is None else spec.schedule.with_loops(loops)
    first = spec.block.residual
    embeddings = spec.vocab_size * width * (1 if spec.tie_embeddings else 2)
    parameters = embeddings + sum(_block_parameters(block, width) for block in spec.blocks)
    looped = zip((s for s in spec.schedule.segments if s.looped), spec.loop_parts, strict=True)
    parameters += sum(part.parameters(width, segment.loops) for segment, parts in looped for part in parts)
    parameters += spec.block.norm.final.parameters(width) + spec.registers * width
    parameters += first.reader_parameters(width) + first.start_parameters(width)
    parameters += sum(part.parameters(spec) for part in (*spec.stem, spec.head, spec.topology))
    flops = visit_flops(spec, run, context, spec.registers) + sum(part.flops(spec) for part in (*spec.stem, spec.head))
    cached = cached_blocks(spec, run)
    return Cost(
        parameters=parameters,
        embedding_parameters=embeddings,
        flops_per_token=flops,
        training_flops_per_token=3 * flops,
        cache_values_per_token=sum(spec.blocks[block].mixer.cache_values(width) for block in cached),
        state_values=outer_values(spec)
        + sum(_own_recent_values(spec, block) + spec.blocks[block].mixer.state_values(width) for block in cached)
        + sum(segment.loops for segment in run.segments if segment.looped) * _handed_recent_values(spec),
        context=context,
    )


OWN_LOOPS = LoopTraining()
"""Training with the loop count of the layout, in every loop of which gradients flow."""


def training_flops(spec: ModelSpec, loops: LoopTraining, context: int) -> int:
    """Operations per training token, forward and backward, as the mean over the loop counts that are trained with.

    Args:
        spec: the model.
        loops: how the loop count of each step is chosen, and how many loops carry gradient.
        context: attended positions, as of :func:`cost`.
    """
    if not spec.schedule.is_looped:
        return cost(spec, context=context).training_flops_per_token
    total = 0.0
    for count, share in loops.shares(spec.schedule.loops).items():
        back = min(count, loops.backprop or count)
        forward, reached = (cost(spec, context=context, loops=n).flops_per_token for n in (count, back))
        total += share * (forward + 2 * reached)
    return round(total)


def cached_blocks(spec: ModelSpec, schedule: Schedule) -> list[int]:
    """The block of every cache entry: one entry for each visit, or for each block with ``share_last_kv``."""
    return list(range(schedule.num_blocks)) if spec.share_last_kv else [visit.block for visit in schedule.visits]


def _block_parameters(block: BlockSpec, width: int) -> int:
    norms = {"final": 0, "pre": 1, "sandwich": 2}[block.norm.placement]
    joined = norms * block.norm.parameters(width) + block.residual.parameters(width)
    reading = block.residual.reader_parameters(width) + block.residual.entrance_parameters(width)
    return block.mixer.parameters(width) + block.ffn.parameters(width) + block.sublayers * joined + reading


def visit_flops(spec: ModelSpec, schedule: Schedule, context: int, registers: int = 0) -> int:
    """Operations of all visits for one token, loop parts and topology included, stem and head not."""
    width, total = spec.hidden_size, spec.topology.flops(spec, schedule)
    for visit in schedule.visits:
        block = spec.blocks[visit.block]
        total += block.mixer.flops(width, context, registers) + block.ffn.flops(width)
        total += block.sublayers * block.residual.flops(width)
    for segment in schedule.segments:
        for block in (spec.blocks[number] for number in segment.blocks if segment.looped):
            total += segment.loops * (block.mixer.loop_flops(width) + block.ffn.loop_flops(width))
    for segment, parts in zip((s for s in schedule.segments if s.looped), spec.loop_parts, strict=True):
        total += spec.block.residual.channels * sum(part.flops(width, segment.loops) for part in parts)
    return total


def text_flops(spec: ModelSpec, schedule: Schedule) -> int:
    """Operations that are done once for a whole text, which :attr:`Cost.flops_per_token` leaves out."""
    looped = zip((s for s in schedule.segments if s.looped), spec.loop_parts, strict=True)
    return sum(part.text_flops(spec.hidden_size, segment.loops) for segment, parts in looped for part in parts)


def recent_values(spec: ModelSpec, number: int) -> int:
    """Numbers that a visit of block ``number`` remembers at most per sequence, for filters over tokens and for what the
    loop parts of a loop that it begins hand to its visits, beside keys and values."""
    begins = any(segment.looped and segment.first_block == number for segment in spec.schedule.segments)
    return _own_recent_values(spec, number) + (_handed_recent_values(spec) if begins else 0)


def _own_recent_values(spec: ModelSpec, number: int) -> int:
    block, width = spec.blocks[number], spec.hidden_size
    return block.mixer.recent_values(width) + block.sublayers * block.residual.reader_values(width)


def _handed_recent_values(spec: ModelSpec) -> int:
    return sum(part.recent_values(spec.hidden_size) for part in spec.loop)


def outer_values(spec: ModelSpec) -> int:
    """Numbers that are remembered per sequence outside every visit: by the stem, the start of the stream, the head."""
    residual, width = spec.block.residual, spec.hidden_size
    stream = residual.start_values(width) + residual.reader_values(width)
    return stream + sum(part.recent_values(width) for part in spec.stem)


def describe(spec: ModelSpec, *, context: int = 512, trained: int | None = None) -> str:
    """The drawing that ``ouroboros show`` prints: one line per segment, then the costs; ``trained`` of the parameters,
    where training leaves some as they are."""
    schedule, total = spec.schedule, cost(spec, context=context)
    wired = "" if spec.topology == ModelSpec().topology else f", wired as {spec.topology.kind}"
    lines = [f"layout {schedule.notation}: {schedule.num_blocks} blocks, {schedule.num_visits} visits{wired}", ""]
    lines += [f"  tokens ({spec.vocab_size})" + _named(spec.stem), "    |"]
    for segment in schedule.segments:
        names = [f"[{block}]" for block in segment.blocks]
        shown = "-".join(names) if len(names) <= 8 else f"{names[0]}-..-{names[-1]}"
        lines.append(f"    {shown}" + (f"  {segment.name}" if segment.name else ""))
        lines += [f"      {line}" for line in _differences(spec, segment)]
        if segment.looped:
            lines.append(f"    ^{'_' * (len(shown) - 2)}|  x {segment.loops}" + _named(spec.loop))
        lines.append("    |")
    entries = len(cached_blocks(spec, schedule))
    most = ", in all loops (tokens may halt before)" if any(part.saves for part in spec.loop) else ""
    lines += [
        "  logits",
        "",
        f"parameters           {total.parameters:>14,}  ({total.embedding_parameters:,} in embeddings)",
        *([] if trained is None else [f"trained parameters   {trained:>14,}  the others stay as they are"]),
        f"FLOPs/token          {total.flops_per_token:>14,}  forward, attending to {context} positions{most}",
        f"FLOPs/token, training{total.training_flops_per_token:>14,}",
        f"cache bytes/token    {total.cache_bytes_per_token():>14,}  float32, {entries} entries",
        f"state bytes/sequence {total.state_bytes():>14,}",
        f"bytes at 6 bits      {total.parameters * 6 / 8:>14,.0f}  before compression",
    ]
    return "\n".join(lines)


def _named(parts: tuple[Part, ...]) -> str:
    return "".join(f"{', ' if index else '  with '}{part.kind}" for index, part in enumerate(parts))


def _differences(spec: ModelSpec, segment: Segment) -> Iterator[str]:
    """How the blocks of a segment differ from the model's own, in words; where they are visited again, nothing."""
    blocks = [] if segment.again else segment.blocks
    found = [(block, _own_options(spec, Place(segment, block))) for block in blocks]
    for options, group in itertools.groupby(found, lambda pair: pair[1]):
        first, *rest = [block for block, _ in group]
        which = f"[{first}]" + (f" to [{rest[-1]}]" if rest else "") + ": "
        if options:
            yield options if len(rest) + 1 == segment.num_blocks else which + options


def _own_options(spec: ModelSpec, place: Place) -> str:
    """What a block has that the model's own would not have at its place, by dotted path."""
    assert place.block is not None
    found, own = spec.blocks[place.block], spec.block.at(place)
    parts = {name: (getattr(found, name), getattr(own, name)) for name in ("mixer", "ffn", "norm", "residual")}
    kinds = {name: (there.kind, here.kind) for name, (there, here) in parts.items()}
    other = {name: there for name, (there, here) in kinds.items() if there != here}
    # What another kind of part has by default is not worth saying, nor what it has in common with the present one.
    changed = dataclasses.replace(own, **{n: of_kind(parts[n][1], kind).at(place) for n, kind in other.items()})
    usual = fields_by_path(changed) | fields_by_path(own)
    words = [f"{name} = {kind}" for name, kind in other.items()]
    for path, value in fields_by_path(found).items():
        if value != usual[path] and not path.endswith(".kind"):
            words.append(f"{path} = {' '.join(map(str, value)) if isinstance(value, list) else value}")
    return ", ".join(words)
