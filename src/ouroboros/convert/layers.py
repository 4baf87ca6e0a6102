"""Which layers of a donor each block of another layout is made of, and the model that has those blocks."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

from ouroboros.config import BlockOverride, BlockSpec, ModelSpec, fields_by_path
from ouroboros.errors import check
from ouroboros.schedule import Schedule, numbers_of

if TYPE_CHECKING:
    from torch import Tensor

Layers = tuple[tuple[int, ...], ...]
"""For each block the donor's layers that it is made of: one, or several whose mean it is."""
Init = Literal["selected", "stepwise", "averaged"]
"""How the blocks of a loop are chosen among the layers that neither prelude nor coda takes."""
LAYER = "model.decoder.layers."
"""How names of tensors of blocks begin, with a number behind it."""
T = TypeVar("T")


class Split(NamedTuple):
    """A layout of one loop between other blocks, and a donor's layers for it."""

    prelude: int
    """Blocks before the loop, which are the donor's first layers."""
    looped: int
    """Blocks of the loop."""
    coda: int
    """Blocks behind the loop, which are the donor's last layers."""
    layers: int
    """Layers of the donor."""

    @property
    def middle(self) -> range:
        """The donor's layers that neither prelude nor coda takes."""
        return range(self.prelude, self.layers - self.coda)

    def kept(self, looped: Sequence[tuple[int, ...]]) -> Layers:
        """The layers of all blocks, with these for the loop."""
        ends = [(layer,) for layer in range(self.layers)]
        return (*ends[: self.prelude], *looped, *ends[self.layers - self.coda :])


def split(schedule: Schedule, layers: int) -> Split:
    """What a layout leaves to choose.

    Raises:
        OuroborosError: it has no loop or several, visits blocks anew, or has more blocks than the donor has layers.
    """
    layout, looped = schedule.notation, [segment for segment in schedule.segments if segment.looped]
    fix = "write one loop, as in '8 loop:(1)x4 8', or name the layers with --keep"
    check(bool(looped), f"layout {layout!r} has no loop whose layers could be chosen: {fix}")
    one = len(looped) == 1 and not any(segment.again for segment in schedule.segments)
    check(one, f"layout {layout!r} has more than a prelude, one loop and a coda: {fix}")
    check(
        schedule.num_blocks <= layers,
        f"layout {layout!r} has {schedule.num_blocks} blocks and the donor {layers} layers: take fewer blocks",
    )
    loop = looped[0]
    return Split(loop.first_block, loop.num_blocks, schedule.num_blocks - loop.blocks.stop, layers)


def groups(items: Sequence[T], count: int) -> list[Sequence[T]]:
    """``items`` as ``count`` runs of neighbours, as equal as can be; where there are more runs than items, neighbouring
    runs share one."""
    bounds = [len(items) * index // count for index in range(count + 1)]
    return [items[low : max(high, low + 1)] for low, high in itertools.pairwise(bounds)]


def initial(how: Literal["stepwise", "averaged"], schedule: Schedule, layers: int) -> Layers:
    """The layers of every block, those of the loop chosen by their place alone.

    ``averaged`` cuts the layers between prelude and coda into runs of neighbours, as many as the loop has blocks, and
    takes the mean of each; ``stepwise`` takes the layer in the middle of each, so that they are evenly spaced
    (Relaxed Recursive Transformers, arXiv 2410.20672).

    Raises:
        OuroborosError: the layout does not fit, see :func:`split`.
    """
    found = split(schedule, layers)
    runs = [tuple(run) for run in groups(found.middle, found.looped)]
    return found.kept(runs if how == "averaged" else [(run[len(run) // 2],) for run in runs])


def named(text: str, layers: int, blocks: int, option: str = "--keep") -> Layers:
    """The layers of each block, by a list: ``0-1,3+4,5`` is layers 0 and 1, the mean of 3 and 4, and 5.

    Raises:
        OuroborosError: it is no such list, names a layer that is not there, or is of another length.
    """
    found: list[tuple[int, ...]] = []
    for item in text.split(","):
        numbers = [numbers_of(part.strip(), layers, option) for part in item.split("+")]
        flat = tuple(itertools.chain.from_iterable(numbers))
        check(len(set(flat)) == len(flat), f"{option}: {item.strip()!r} has a layer twice in one mean")
        found.extend([flat] if len(numbers) > 1 else [(number,) for number in flat])
    check(len(found) == blocks, f"{option}: {text!r} lists {len(found)} blocks, the model has {blocks}")
    return tuple(found)


def listed(kept: Layers) -> str:
    """The layers as :func:`named` reads them."""
    shown: list[str] = []
    single = itertools.groupby(enumerate(kept), lambda pair: pair[1][0] - pair[0] if len(pair[1]) == 1 else None)
    for distance, run in single:
        of_run = [layers for _, layers in run]
        if distance is not None:
            shown += _runs([layers[0] for layers in of_run])
        else:
            shown += ["+".join((str(layers[0]), *_runs(layers[1:]))) for layers in of_run]
    return ",".join(shown)


def _runs(numbers: Sequence[int]) -> list[str]:
    """Numbers as text, runs of them as ranges."""
    found = [list(run) for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return [f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in found]


def removed(kept: Layers, layers: int) -> list[int]:
    """The donor's layers that are no block by themselves; those of a mean are among them."""
    return [layer for layer in range(layers) if (layer,) not in kept]


def cut(donor: ModelSpec, layout: str, kept: Layers) -> ModelSpec:
    """The model whose blocks are these layers of ``donor``, a plain stack of layers.

    Raises:
        OuroborosError: a mean of layers that are not of one kind, or a layout that is wrong.
    """
    blocks = [donor.blocks[layers[0]] for layers in kept]
    for layers, block in zip(kept, blocks, strict=True):
        for layer in layers:
            other = ", ".join(sorted(_change(donor.blocks[layer], block)))
            check(not other, f"layers {layers[0]} and {layer} differ in {other}: only layers of one kind have a mean")
    overrides, first = [], 0
    for block, run in itertools.groupby(blocks):
        last = first + len(list(run)) - 1
        if change := _change(block, donor.block):
            overrides.append(BlockOverride(where=f"{first}-{last}" if last > first else str(first), set=change))
        first = last + 1
    return dataclasses.replace(donor, layout=layout, overrides=tuple(overrides))


def _change(block: BlockSpec, usual: BlockSpec) -> dict[str, object]:
    """The options of ``block`` by dotted path that are not as usual."""
    here, there = fields_by_path(block), fields_by_path(usual)
    return {path: value for path, value in here.items() if value != there[path]}


def chosen(tensors: Mapping[str, Tensor], kept: Layers) -> dict[str, Tensor]:
    """The tensors of a donor, in our names, for blocks made of these layers.

    A mean is taken in float32. Layers are not aligned with each other, so their mean is smaller than each of them:
    n unrelated matrices of one size have a mean of that size divided by the square root of n.
    """
    import torch

    name_of = re.compile(re.escape(LAYER) + r"(\d+)\.(.*)")
    matches = {name: name_of.fullmatch(name) for name in tensors}
    found = {name: tensors[name] for name, match in matches.items() if match is None}
    inside = {match[2] for match in matches.values() if match is not None}
    for block, layers in enumerate(kept):
        for name in inside:
            of_layers = [tensors[full] for layer in layers if (full := f"{LAYER}{layer}.{name}") in tensors]
            if of_layers:
                mean = len(layers) > 1
                found[f"{LAYER}{block}.{name}"] = (
                    torch.stack([tensor.float() for tensor in of_layers]).mean(0) if mean else of_layers[0]
                )
    return found
