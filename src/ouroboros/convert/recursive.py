"""A pretrained model made recursive: a layout with a loop, whose blocks are modulated by loop parts."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ouroboros.config import LoopPart, ModelSpec
from ouroboros.config.parts.modulated import CORES, modulated
from ouroboros.convert.bases import Kind, bases_of
from ouroboros.convert.layers import Layers, chosen, cut
from ouroboros.convert.tensors import OUTPUT
from ouroboros.errors import check
from ouroboros.model.configuration import OuroborosConfig
from ouroboros.model.modeling import OuroborosForCausalLM


def recursive(
    donor: Mapping[str, Tensor],
    spec: ModelSpec,
    layout: str,
    kept: Layers,
    loop_parts: tuple[LoopPart, ...] = (),
    *,
    rank: int = 32,
    alpha: float = 16.0,
    bases: Kind = "mean",
    trained: bool = False,
) -> OuroborosForCausalLM:
    """The model of a donor in a layout with a loop, float32, in evaluation mode. The ids that begin, end and pad texts
    are left to the caller: the donor's are in its ``generation_config``.

    Loop parts are at their start. If one of them hands cores, the looped blocks have modulated maps, whose bases are
    made of the donor's removed layers; otherwise they are the donor's plain ones.

    Args:
        donor: its tensors in our names, see :func:`~ouroboros.convert.donors.tensors_of`.
        spec: of the donor, a plain stack of layers.
        layout: of the blocks.
        kept: for each block the donor's layers that it is made of.
        loop_parts: what enters at the boundaries of its loops.
        rank: of the bases.
        alpha: what is added is multiplied by ``alpha / rank``.
        bases: how they are made; ``stepwise`` ones are those of each loop.
        trained: whether bases are trained.

    Raises:
        OuroborosError: a layout without a loop, a layer that a loop and another block share, loop parts with fewer rows
            than loops, parts that do not fit the donor's.
    """
    made = cut(spec, layout, kept)
    schedule = made.schedule
    check(schedule.is_looped, f"layout {layout!r} has no loop: write for example '8 loop:(1)x4 8'")
    looped = {block for segment in schedule.stored if segment.looped for block in segment.blocks}
    outside = {layer for block, layers in enumerate(kept) if block not in looped for layer in layers}
    for block in sorted(looped):
        shared = sorted(outside.intersection(kept[block]))
        check(
            not shared,
            f"layer {shared[0] if shared else 0} of looped block {block} is inside prelude or coda: loop another one",
        )
    for part in loop_parts:
        rows = getattr(part, "rows", None)
        check(
            rows is None or rows >= schedule.loops,
            f"loop.{part.kind}.rows is {rows}, and layout {layout!r} has {schedule.loops} loops: later ones would share"
            " the last row; give more rows or fewer loops",
        )
    made = modulated(made, loop_parts, rank=rank, alpha=alpha, trained=trained, by_loop=bases == "stepwise")
    model = OuroborosForCausalLM(OuroborosConfig.from_spec(made))
    tensors = chosen(donor, kept)
    if any(part.hands == CORES for part in loop_parts):
        tensors |= bases_of(model.state_dict(), donor, schedule, kept, bases)
    missing, unknown = model.load_state_dict(tensors, strict=False)
    missing = [name for name in missing if ".loops." not in name and not (made.tie_embeddings and name == OUTPUT)]
    check(not missing and not unknown, f"the donor lacks {missing[:3]} and has {unknown[:3]}, which the model has not")
    return model.eval()
