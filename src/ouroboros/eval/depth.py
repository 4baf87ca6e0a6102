"""How many loops each token of a text takes, where a part halts tokens (Controller, section 8: depth analysis).

Shapes: B = 1 text, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ouroboros.errors import check
from ouroboros.eval.stats import Record
from ouroboros.model.executor import observe
from ouroboros.model.modeling import OuroborosForCausalLM


@dataclass(frozen=True, kw_only=True)
class Depth(Record):
    """What was found about one looped segment."""

    segment: int
    """Its index among all segments."""
    steps: tuple[int, ...]
    """For each token the number of loops until it halts; all of them, if it does not."""
    halted: tuple[float, ...]
    """For each loop the share of tokens that have halted behind it."""
    probability: tuple[float | None, ...]
    """For each loop the mean halting probability of the tokens that had not halted before; None if all had."""

    @property
    def mean(self) -> float:
        """Loops that a token takes on average."""
        return sum(self.steps) / len(self.steps)


@torch.no_grad()
def depths(model: OuroborosForCausalLM, ids: Tensor) -> list[Depth]:
    """Run the loops of ``model`` on one text and record when its tokens halt; one record for each segment that halts.

    Args:
        model: in evaluation mode.
        ids: token ids, (T,) or (1, T).

    Raises:
        OuroborosError: several texts, or no part of the model halts tokens.
    """
    ids = ids if ids.ndim == 2 else ids[None]
    check(len(ids) == 1, f"depth analysis takes one text at a time, got {len(ids)}")
    found: dict[int, list[dict[str, Tensor]]] = {}

    def record(segment: int, loop: int, told: dict[str, Tensor]) -> None:
        if "halted" in told:
            found.setdefault(segment, []).append({name: x[0] for name, x in told.items()})

    with observe(model, on_positions=record):
        model(ids, use_cache=False, logits_to_keep=1)
    check(bool(found), "no part of the model halts tokens, so all take every loop; train one with --model.loop.halt")
    return [_depth(segment, loops) for segment, loops in found.items()]


def _depth(segment: int, loops: list[dict[str, Tensor]]) -> Depth:
    ran = torch.stack([told["ran"] for told in loops])
    probabilities = [told["probability"][told["ran"]] for told in loops]
    return Depth(
        segment=segment,
        steps=tuple(ran.sum(dim=0).tolist()),
        halted=tuple(float(told["halted"].float().mean()) for told in loops),
        probability=tuple(float(p.mean()) if len(p) else None for p in probabilities),
    )
