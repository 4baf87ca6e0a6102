"""What loops do on a text: what their parts hand to the blocks, what they multiply with, and how the state changes.

Shapes: B = 1 text, T tokens, R numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ouroboros.errors import check
from ouroboros.model.executor import observe
from ouroboros.model.modeling import OuroborosForCausalLM


@dataclass(frozen=True, kw_only=True)
class LoopRecord:
    """One loop of one text, in float32 on the processor."""

    segment: int
    """The index of the looped segment among all segments."""
    loop: int
    """Counted from 0."""
    update: Tensor
    """For each token the length of the change of its state, divided by that of the state before, (T,)."""
    cosine: Tensor
    """For each token the cosine of its state with the one before, (T,)."""
    handed: dict[str, Tensor] = field(default_factory=dict)
    """What parts handed to the blocks, by name: (T, R), or (1, R) where all tokens get the same."""
    told: dict[str, Tensor] = field(default_factory=dict)
    """What parts tell of each token by name, (T,): the mean over the channels of what they multiply with; of halting
    what :class:`~ouroboros.nn.halt.Halt` tells."""


@torch.no_grad()
def loop_records(model: OuroborosForCausalLM, ids: Tensor) -> list[LoopRecord]:
    """Run ``model`` on one text and record every loop, in the order of the run.

    The state of a last loop is the one behind everything that parts do when they leave the loops, such as a bridge.

    Args:
        model: in evaluation mode; its own loop count is the depth.
        ids: token ids, (T,) or (1, T).

    Raises:
        OuroborosError: several texts.
    """
    ids = (ids if ids.ndim == 2 else ids[None]).to(next(model.parameters()).device)
    check(len(ids) == 1, f"loops are recorded of one text at a time, got {len(ids)}")
    found: list[LoopRecord] = []
    handed: dict[str, Tensor] = {}

    def on_visit(block: Any, visit: Any, before: Tensor, after: Tensor) -> None:
        for name, value in visit.handed.items():
            handed[name] = _of_tokens(value.detach().to("cpu", torch.float32, copy=True), before.shape[1])

    def on_loop(segment: int, loop: int, before: Tensor, after: Tensor) -> None:
        x, z = before[0].flatten(1).float().cpu(), after[0].flatten(1).float().cpu()
        update = (z - x).norm(dim=-1) / x.norm(dim=-1).clamp(min=1e-12)
        cosine = F.cosine_similarity(z, x, dim=-1)
        found.append(LoopRecord(segment=segment, loop=loop, update=update, cosine=cosine, handed=dict(handed)))
        handed.clear()

    def on_positions(segment: int, loop: int, told: dict[str, Tensor]) -> None:
        found[-1].told.update({name: x[0].cpu() for name, x in told.items()})

    with observe(model, on_visit, on_loop, on_positions):
        model(ids, use_cache=False, logits_to_keep=1)
    return found


def _of_tokens(value: Tensor, tokens: int) -> Tensor:
    """What is handed, as (T, R) or (1, R); registers, which stand in front of the text, are left out."""
    return value[0].flatten(1)[-tokens:] if value.ndim >= 3 else value.reshape(1, -1)


class Spread(NamedTuple):
    """How much something that is handed differs, as L2 distances; None where there is nothing to compare."""

    norm: float
    """Its own length, the mean over texts, loops and tokens."""
    loops: float | None
    """Between the first loop and each later one, of the same token."""
    tokens: float | None
    """Between tokens that follow each other, in the same loop; 0 where all tokens get the same."""
    texts: float | None
    """Between the means of texts that follow each other, in the same loop."""


def spread(texts: Sequence[Sequence[LoopRecord]], names: Sequence[str]) -> Spread:
    """The distances of what is handed under ``names``, taken together.

    Args:
        texts: the records of one segment on each text.
        names: of what is handed.
    """
    values = [[torch.cat([one.handed[name] for name in names], dim=-1) for one in records] for records in texts]
    every = [value for loops in values for value in loops]
    means = [torch.stack([value.mean(0) for value in loops]) for loops in values]
    pairs = itertools.pairwise(means)
    norm = _mean([value.norm(dim=-1) for value in every])
    return Spread(
        norm=norm or 0.0,
        loops=_mean([(later - loops[0]).norm(dim=-1) for loops in values for later in loops[1:]]),
        tokens=0.0 if all(len(value) == 1 for value in every) else _mean([_steps(value) for value in every]),
        texts=_mean([(one - other).norm(dim=-1) for one, other in pairs]),
    )


def _steps(value: Tensor) -> Tensor:
    return value.diff(dim=0).norm(dim=-1)


def _mean(values: list[Tensor]) -> float | None:
    whole = torch.cat(values) if values else torch.empty(0)
    return float(whole.mean()) if len(whole) else None
