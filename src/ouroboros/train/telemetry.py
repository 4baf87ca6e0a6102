"""Telemetry of loops (what each does to the state, how strong its gradient is) and of what parts tell of themselves.

Shapes: B batch, T positions, D model width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ouroboros import registry


class LoopTelemetry:
    """A probe for :class:`~ouroboros.model.executor.Decoder`; collects one record per loop of one forward pass.

    For the state ``x`` before and ``z`` after a loop: ``state_norm`` is the RMS of ``z``; ``update_ratio`` is
    ``|z - x| / |x|``; ``cosine`` is the cosine of this loop's update with the previous loop's; ``grad_norm`` is the
    norm of the loss gradient at ``z`` (after :meth:`collect`). Means over tokens, in float32.
    """

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self._states: list[Tensor] = []
        self._previous: tuple[int, Tensor] | None = None

    def __call__(self, segment: int, loop: int, before_BTD: Tensor, after_BTD: Tensor) -> None:
        """Record one loop."""
        with torch.no_grad():
            before, after = before_BTD.detach().float(), after_BTD.detach().float()
            update = after - before
            ratio = update.norm(dim=-1) / before.norm(dim=-1).clamp(min=1e-12)
            cosine = None
            if self._previous is not None and self._previous[0] == segment:
                cosine = torch.cosine_similarity(update, self._previous[1], dim=-1).mean().item()
            self._previous = (segment, update)
            self.records.append(
                {
                    "segment": segment,
                    "loop": loop,
                    "state_norm": after.square().mean().sqrt().item(),
                    "update_ratio": ratio.mean().item(),
                    "cosine": cosine,
                }
            )
        if after_BTD.requires_grad:
            after_BTD.retain_grad()
        self._states.append(after_BTD)

    def collect(self) -> list[dict[str, Any]]:
        """The records, with gradient norms if a backward pass has run."""
        for record, state in zip(self.records, self._states, strict=True):
            record["grad_norm"] = None if state.grad is None else state.grad.float().norm().item()
        self._states.clear()
        return self.records


def part_records(model: Any, batch: np.ndarray) -> dict[str, Any]:
    """What the parts of ``model`` tell of themselves on ``batch`` (B, T + 1), for the telemetry record.

    Entries of the registry's place ``telemetry`` are functions of the two that return what is to be recorded, and
    nothing for models without the part.
    """
    found: dict[str, Any] = {}
    for target in registry.found("telemetry").values():
        found |= registry.load(target)(model, batch)
    return found
